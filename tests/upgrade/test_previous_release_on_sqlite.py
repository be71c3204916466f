"""The same tests with SQLite; in a separate file, so that both kinds of database run side by side."""

from tests.upgrade.test_previous_release import *  # noqa: F403

KIND = "sqlite"

"""The command `farm`: one file for each group of commands."""

from farm.cli.main import main as main

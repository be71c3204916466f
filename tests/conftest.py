"""What every test may use."""

import pytest
from hypothesis import settings

pytest_plugins = ["tests.servers"]

# Ten thousand cases of each property: `pytest --hypothesis-profile long`.
settings.register_profile("short", max_examples=200, deadline=None)
settings.register_profile("long", max_examples=10_000, deadline=None)
settings.load_profile("short")

ASKED_FOR = ("chaos", "compose", "hosts", "long")
"""Marks of what runs only when it is asked for: `pytest -m chaos`, as `make chaos` does."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what runs only when it is asked for, unless marks are chosen on the command line."""
    if config.getoption("markexpr"):
        return
    left_out = {item for item in items if any(item.get_closest_marker(mark) for mark in ASKED_FOR)}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]

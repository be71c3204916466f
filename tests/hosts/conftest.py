"""These tests make network namespaces, and run only when they are asked for by their mark: `make hosts-test`."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is marked `hosts`, unless marks are chosen on the command line."""
    if config.getoption("markexpr"):
        return
    asked_for = [item for item in items if item.get_closest_marker("hosts")]
    if asked_for:
        config.hook.pytest_deselected(items=asked_for)
        items[:] = [item for item in items if item not in asked_for]

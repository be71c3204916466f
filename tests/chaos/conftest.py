"""The long form runs only when it is asked for by its mark: `pytest -m chaos`, which `make chaos` does."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is marked `chaos`, unless marks are chosen on the command line."""
    if config.getoption("markexpr"):
        return
    long = [item for item in items if item.get_closest_marker("chaos")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]

"""What runs containers is run only by its mark: `pytest -m compose`, as `make compose-test` does."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is marked `compose`, unless marks are chosen on the command line."""
    if config.getoption("markexpr"):
        return
    contained = [item for item in items if item.get_closest_marker("compose")]
    if contained:
        config.hook.pytest_deselected(items=contained)
        items[:] = [item for item in items if item not in contained]

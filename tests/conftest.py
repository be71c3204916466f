"""Options and fixtures for all tests."""

import gc
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = ["tests.servers"]

# Ten thousand examples of each property: `pytest --hypothesis-profile long`.
settings.register_profile("short", max_examples=200, deadline=None)
settings.register_profile("long", max_examples=10_000, deadline=None)
settings.load_profile("short")

ASKED_FOR = ("chaos", "compose", "hosts", "long")
"""Marks of tests that run only on request: `pytest -m chaos`, as `make chaos` does."""


RENDERING = ("torch", "diffusers", "transformers", "huggingface_hub", "safetensors", "tokenizers", "numpy", "scipy")
"""Packages that a worker needs and a client does not."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--without-torch`: run the tests that need no worker, as on a machine where torch is not installed."""
    parser.addoption("--without-torch", action="store_true", help="leave out all tests that need torch")


def pytest_configure(config: pytest.Config) -> None:
    """With `--without-torch`, make the import of torch fail even where it is installed."""
    if config.getoption("--without-torch"):
        sys.modules["torch"] = None  # type: ignore[assignment]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--without-torch`, ignore test files that import a worker's packages, directly or through fixtures."""
    path = collection_path / "conftest.py" if collection_path.is_dir() else collection_path
    looked_at = path.name == "conftest.py" or path.match("test_*.py")
    if not (config.getoption("--without-torch") and looked_at and path.exists()):
        return None
    try:
        importlib.import_module(".".join(path.relative_to(config.rootpath).with_suffix("").parts))
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in RENDERING:
            return True
    return None


@pytest.fixture(scope="module", autouse=True)
def _garbage_is_collected() -> Iterator[None]:
    """Collect garbage after each file, so that an unclosed resource fails that file and not a later one."""
    yield
    gc.collect()


def pytest_collection_finish() -> None:
    """Exclude imports from garbage collection: with torch and diffusers, a collection takes a quarter of a second."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that run only on request, unless marks are chosen on the command line."""
    if config.getoption("markexpr"):
        return
    left_out = {item for item in items if any(item.get_closest_marker(mark) for mark in ASKED_FOR)}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]

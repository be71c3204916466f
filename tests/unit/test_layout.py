"""`tests/unit` mirrors the packages: each has a folder of tests, and each test imports its folder's package."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "tests" / "unit"


def packages(root: Path) -> list[Path]:
    """Return the packages below `farm` and `workers` in a root, relative to it."""
    return sorted(
        path.parent.relative_to(root)
        for product in ("farm", "workers")
        for path in (root / product).rglob("*/__init__.py")
    )


PACKAGES, FOLDERS = packages(ROOT), packages(UNIT)
FILES = sorted(path for folder in FOLDERS for path in (UNIT / folder).glob("test_*.py"))


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports at its top level."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def names_of_tests(path: Path) -> list[str]:
    """Return the names of a file's test functions."""
    functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
    return [function.name for function in functions if function.name.startswith("test_")]


def test_every_folder_of_unit_tests_is_a_package_of_the_product() -> None:
    assert [folder for folder in FOLDERS if folder not in PACKAGES] == []


@pytest.mark.parametrize("package", PACKAGES, ids=Path.as_posix)
def test_every_package_of_the_product_has_a_unit_test(package: Path) -> None:
    assert any(names_of_tests(path) for path in (UNIT / package).glob("test_*.py"))


def test_every_folder_with_unit_tests_is_looked_at() -> None:
    every = {path for product in ("farm", "workers") for path in (UNIT / product).rglob("*/test_*.py")}
    assert every == set(FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(UNIT).as_posix())
def test_every_unit_test_imports_the_package_of_its_folder(path: Path) -> None:
    package = path.parent.relative_to(UNIT).as_posix().replace("/", ".")
    assert any(module == package or module.startswith(f"{package}.") for module in imported(path))

"""`tests/unit` mirrors the packages: a test lies in the folder of the package that it imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "tests" / "unit"
FOLDERS = sorted(
    path for product in ("farm", "workers") for path in (UNIT / product).rglob("*") if (path / "__init__.py").exists()
)
FILES = sorted(path for folder in FOLDERS for path in folder.glob("test_*.py"))


def imported(path: Path) -> set[str]:
    """The modules that a file imports at its top."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(UNIT).as_posix())
def test_every_folder_of_unit_tests_is_a_package_of_the_product(folder: Path) -> None:
    assert (ROOT / folder.relative_to(UNIT) / "__init__.py").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(UNIT).as_posix())
def test_every_unit_test_imports_the_package_of_its_folder(path: Path) -> None:
    package = path.parent.relative_to(UNIT).as_posix().replace("/", ".")
    assert any(module == package or module.startswith(f"{package}.") for module in imported(path))

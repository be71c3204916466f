"""The import contracts of `pyproject.toml` fail closed: any package of a copy with a forbidden import breaks one."""

import itertools
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CONTRACTS: list[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
]
PRODUCTS = ("farm", "workers")


def packages(product: str) -> list[str]:
    """Return the packages of a product."""
    folders = (ROOT / product).iterdir()
    return sorted(f"{product}.{path.name}" for path in folders if (path / "__init__.py").exists())


def imports_of_higher_layers() -> Iterator[tuple[str, str, str]]:
    """Yield (contract, package, package of a higher layer) for every pair of layers."""
    for contract in CONTRACTS:
        if contract["type"] == "layers":
            (product,) = contract["containers"]
            layers = [[f"{product}.{name.strip()}" for name in layer.split("|")] for layer in contract["layers"]]
            for above, below in itertools.combinations(layers, 2):
                for package in set(below) & set(packages(product)):
                    yield contract["name"], package, above[0]


def imports_of_libraries() -> Iterator[tuple[str, str, str]]:
    """Yield (contract, package or module, forbidden library) for every contract about libraries."""
    every = [package for product in PRODUCTS for package in packages(product)]
    for contract in CONTRACTS:
        if contract["type"] == "protected":
            libraries = contract["protected_modules"]
            importers = [package for package in every if package not in contract["allowed_importers"]]
        elif contract["type"] == "forbidden":
            libraries = contract["forbidden_modules"]
            sources = contract["source_modules"]
            importers = [name for source in sources for name in (packages(source) if source in PRODUCTS else [source])]
        else:
            continue
        for importer, library in itertools.product(importers, libraries):
            yield contract["name"], importer, library


def imports_of_siblings() -> Iterator[tuple[str, str, str]]:
    """Yield (contract, package, other package or module of the same layer) for every ordered pair within a layer."""
    for contract in CONTRACTS:
        if contract["type"] == "layers":
            (product,) = contract["containers"]
            for layer in contract["layers"]:
                names = [f"{product}.{name.strip()}" for name in layer.split("|")]
                for package, other in itertools.permutations(names, 2):
                    if package in packages(product):
                        yield contract["name"], package, other


FORBIDDEN = [*imports_of_higher_layers(), *imports_of_siblings(), *imports_of_libraries()]


def copied(folder: Path) -> Path:
    """Copy the products and their contracts into a folder, and return it."""
    for product in PRODUCTS:
        shutil.copytree(ROOT / product, folder / product, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `lint-imports` on a copy, which takes precedence over the installed packages."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={"COLUMNS": "500", "PYTHONPATH": str(folder)},
    )


def added_to(importer: str, number: int) -> str:
    """Return the module that gets a forbidden import: a new module of a package, or the module that a contract
    names.
    """
    return f"{importer}.forbidden_{number}" if (ROOT / importer.replace(".", "/")).is_dir() else importer


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the linter's report by broken contract, for a copy with every forbidden import and a new package."""
    folder = copied(tmp_path_factory.mktemp("forbidden"))
    for number, (_, importer, imported) in enumerate(FORBIDDEN):
        path = folder / added_to(importer, number).replace(".", "/")
        with path.with_suffix(".py").open("a") as module:
            module.write(f"import {imported}\n")
    for product in PRODUCTS:
        (folder / product / "unforeseen").mkdir()
        (folder / product / "unforeseen" / "__init__.py").write_text("")
    linted = lint(folder)
    assert linted.returncode == 1, linted.stdout + linted.stderr
    said = linted.stdout.partition("Broken contracts")[2]
    names = "|".join(re.escape(contract["name"]) for contract in CONTRACTS)
    parts = re.split(f"^({names})\n-+\n", said, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_tree_as_it_is_keeps_all_contracts(tmp_path: Path) -> None:
    linted = lint(copied(tmp_path))
    assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize("product", PRODUCTS)
def test_every_package_is_tried(product: str) -> None:
    assert packages(product)
    assert set(packages(product)) <= {importer for _, importer, _ in FORBIDDEN}


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("farm.show", "farm.queue"),
        ("farm.queue", "farm.show"),
        ("farm.jobs", "farm.objects"),
        ("farm.objects", "farm.jobs"),
        *itertools.permutations(("workers.models", "workers.sampling", "workers.outputs"), 2),
        ("workers.tiny", "workers.consumer"),
    ],
)
def test_siblings_and_the_small_model_are_tried_too(importer: str, imported: str) -> None:
    assert (importer, imported) in {(package, other) for _, package, other in FORBIDDEN}


def test_a_module_with_a_forbidden_import_breaks_its_contract(broken: dict[str, str]) -> None:
    missed = [
        f"{importer} imports {imported}"
        for number, (contract, importer, imported) in enumerate(FORBIDDEN)
        if f"{added_to(importer, number)} -> {imported} " not in broken.get(contract, "")
    ]
    assert not missed
    assert set(broken) == {contract["name"] for contract in CONTRACTS}


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_new_package_outside_the_layers_breaks_them(product: str, broken: dict[str, str]) -> None:
    (layers,) = (c["name"] for c in CONTRACTS if c["type"] == "layers" and c["containers"] == [product])
    assert f"{product}.unforeseen" in broken[layers]

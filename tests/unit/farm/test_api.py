"""The public API: the names that `from farm import …` provides, and an import that is fast and has no side effects."""

import inspect
import subprocess
import sys

import pytest

import farm
from farm import errors
from tests.servers import needs_torch


def test_all_is_complete_sorted_and_there() -> None:
    assert list(farm.__all__) == sorted(farm.__all__)
    for name in farm.__all__:
        assert getattr(farm, name).__doc__
    with pytest.raises(AttributeError):
        farm.nothing  # noqa: B018


def test_the_error_tree_is_drawn_as_it_is() -> None:
    drawn = [line.replace("│", " ") for line in (errors.__doc__ or "").splitlines() if "──" in line]
    tree = {}
    parents = {0: "FarmError"}
    for line in drawn:
        depth = line.index("──") // 4
        name = line.split("── ")[1].split()[0]
        parents[depth] = name
        tree[name] = parents[depth - 1]
    real = {
        name: kind.__mro__[1].__name__
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.FarmError) and kind is not errors.FarmError
    }
    assert tree == real


HEAVY = {"torch", "diffusers", "transformers", "workers", "numpy"}


@pytest.mark.parametrize("module", ["farm", "farm.client.farm", "farm.cli.main"])
def test_importing_the_client_loads_no_torch_and_nothing_that_renders(module: str) -> None:
    code = f"import sys, {module}; sys.exit(', '.join({HEAVY!r} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_a_worker_loads_diffusers_with_its_first_model_and_not_before() -> None:
    needs_torch()
    code = (
        "import sys, workers.consumer.serve; sys.exit(', '.join({'diffusers', 'transformers'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.long
def test_a_model_is_loaded_without_a_word_of_what_its_libraries_lack() -> None:
    needs_torch()
    code = (
        "import torch; from workers import tiny; from workers.pipelines import load; "
        "load(str(tiny.WEIGHTS), torch.device('cpu'), torch.bfloat16)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")

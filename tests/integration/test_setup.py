"""`make setup` installs torch from the given index, or warns about the size of PyPI's torch."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def program(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


class Machine:
    """Stub programs of a machine, and a clone whose `.venv` exists but is empty."""

    def __init__(self, folder: Path) -> None:
        self.clone, self.bin, self.pip = folder / "clone", folder / "bin", folder / "pip"
        (self.clone / "infra").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("Makefile", "pyproject.toml", "infra/install-torch", "infra/requirements.py"):
            shutil.copy(ROOT / name, self.clone / name)
        for name in ("make", "sh", "awk", "grep", "touch"):
            (self.bin / name).symlink_to(shutil.which(name) or f"/bin/{name}")
        self.has(kernel="Linux x86_64", torch=False)
        (self.clone / ".venv" / "bin" / "python").touch()

    def has(self, *, kernel: str | None = None, gpu: bool = False, torch: bool | None = None) -> None:
        """Change the machine: its kernel, whether it has a GPU, whether torch is installed."""
        if kernel is not None:
            program(self.bin / "uname", f"echo {kernel}")
        if gpu:
            program(self.bin / "nvidia-smi")
        if torch is not None:
            python = self.clone / ".venv" / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            program(
                python,
                'case "$1" in',
                f'  -m) echo "$@" >> {self.pip} ;;',
                f"  -c) exit {int(not torch)} ;;",
                f'  *) exec {sys.executable} "$@" ;;',
                "esac",
            )

    def make(self, *arguments: str) -> str:
        """Run make; returns its output."""
        done = subprocess.run(
            ["make", *arguments],
            cwd=self.clone,
            env={"PATH": str(self.bin), "LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def installed(self) -> list[str]:
        """Arguments of each pip install, in order."""
        return [line.partition("--disable-pip-version-check ")[2] for line in self.pip.read_text().splitlines()]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has a GPU")
    return Machine(tmp_path)


def test_without_a_gpu_it_says_first_how_much_comes_and_what_to_set(machine: Machine) -> None:
    said = machine.make("setup")
    assert "several GB of CUDA" in said
    assert f"make setup TORCH_INDEX_URL={CPU_INDEX}" in said
    assert said.index("several GB") < said.index("Installing the farm")
    assert machine.installed == ["--editable .[worker,local]"]


@pytest.mark.parametrize(
    "there", [{"gpu": True}, {"torch": True}, {"kernel": "Linux aarch64"}, {"kernel": "Darwin arm64"}], ids=str
)
def test_it_says_nothing_where_nothing_can_be_saved(machine: Machine, there: dict[str, object]) -> None:
    machine.has(**there)  # type: ignore[arg-type]
    assert "CUDA" not in machine.make("setup")
    assert machine.installed == ["--editable .[worker,local]"]


@pytest.mark.parametrize("target", ["setup", ".venv/.dev"])
def test_with_an_index_torch_comes_from_there_before_the_farm(machine: Machine, target: str) -> None:
    said = machine.make(target, f"TORCH_INDEX_URL={CPU_INDEX}")
    assert "several GB" not in said
    torch, farm, *_ = machine.installed
    assert torch.startswith(f"--index-url {CPU_INDEX} torch==")
    assert farm == "--editable .[worker,local]"


def test_a_second_run_asks_pip_for_nothing(machine: Machine) -> None:
    machine.make("setup")
    machine.make("setup", f"TORCH_INDEX_URL={CPU_INDEX}")
    assert machine.installed == ["--editable .[worker,local]"]


def test_help_names_the_index(machine: Machine) -> None:
    assert f"TORCH_INDEX_URL={CPU_INDEX}" in machine.make()

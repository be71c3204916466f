"""Each worker gets its assigned GPU, under a stable name."""

from pathlib import Path

import pytest

from farm.errors import NotConfigured
from farm.settings import Settings
from workers.service.gpus import Gpu, chosen, here, listed
from workers.service.supervisor import seats

A100 = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c2f3b2a-0000-1111-2222-333344445555)
  MIG 3g.20gb     Device  0: (UUID: MIG-aaaaaaaa-1111-5222-8333-444455556666)
  MIG 1g.5gb      Device  1: (UUID: MIG-GPU-5c2f3b2a-0000-1111-2222-333344445555/9/0)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-6c2f3b2a-0000-1111-2222-333344445555)
"""
FIRST_MIG = Gpu("gpu0-mig0", "MIG-aaaaaaaa-1111-5222-8333-444455556666")
WHOLE = Gpu("gpu1", "GPU-6c2f3b2a-0000-1111-2222-333344445555")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `nvidia-smi` that prints the content of a file."""
    says = tmp_path / "says"
    says.write_text(A100)
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\n[ "$1" = -L ] && exec cat {says}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return says


def settings(**given: object) -> Settings:
    return Settings(database_url="sqlite://", broker_url="", s3_bucket="", **given)  # type: ignore[arg-type]


def test_a_gpu_that_is_cut_into_instances_is_used_by_those() -> None:
    assert listed(A100) == [
        FIRST_MIG,
        Gpu("gpu0-mig1", "MIG-GPU-5c2f3b2a-0000-1111-2222-333344445555/9/0"),
        WHOLE,
    ]


def test_the_driver_is_asked_where_nothing_is_said(driver: Path) -> None:
    assert here({}) == listed(A100)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("0,1", ["gpu0", "gpu1"]),
        ("3", ["gpu3"]),  # set by a batch system: other jobs may have the other GPUs
        ("2,-1,0", ["gpu2"]),  # CUDA stops at the invalid index
        ("MIG-aaaaaaaa-1111-5222-8333-444455556666", ["gpu0-mig0"]),
        ("GPU-6c2f3b2a", ["gpu1"]),
        ("GPU-unknown", ["gpu-unknown"]),
    ],
)
def test_only_visible_gpus_are_used(driver: Path, visible: str, names: list[str]) -> None:
    found = here({"CUDA_VISIBLE_DEVICES": visible})
    assert [gpu.name for gpu in found] == names
    assert ",".join(gpu.id for gpu in found) == visible.partition(",-1")[0]


@pytest.mark.parametrize(
    ("wanted", "names"),
    [("all", ["a", "b", "c"]), ("1", ["a"]), ("2", ["a", "b"]), ("2,", ["c"]), ("2,0", ["c", "a"])],
)
def test_some_of_them_may_be_meant(wanted: str, names: list[str]) -> None:
    assert [gpu.name for gpu in chosen(wanted, [Gpu(name, name) for name in "abc"])] == names


@pytest.mark.parametrize(
    ("wanted", "why"),
    [("4", "there are 3 here: a, b, c"), ("0", "at least one"), ("-1", "at least one"), ("0,0", "listed twice")]
    + [(wrong, "all, a number of them, or a list") for wrong in ("every", "1-2", "")],
)
def test_a_missing_gpu_can_not_be_chosen(wanted: str, why: str) -> None:
    with pytest.raises(NotConfigured, match=why):
        chosen(wanted, [Gpu(name, name) for name in "abc"])


def test_a_machine_without_a_gpu_is_said_so(driver: Path) -> None:
    for visible in ("", "-1"):
        with pytest.raises(NotConfigured, match="hides every GPU"):
            here({"CUDA_VISIBLE_DEVICES": visible})
    driver.write_text("No devices found.\n")
    with pytest.raises(NotConfigured, match=r"no NVIDIA GPU .* --workers N"):
        here({})
    (driver.parent / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed: no driver'; exit 9\n")
    with pytest.raises(NotConfigured, match="no driver"):
        here({})
    (driver.parent / "nvidia-smi").unlink()
    with pytest.raises(NotConfigured, match="no NVIDIA GPU"):
        here({})


def test_each_worker_has_a_gpu_a_port_and_cores_of_its_own(driver: Path) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "4,6", "OMP_NUM_THREADS": "3"}
    first, second = seats(environ, settings(metrics_port=9400), "node7", gpus="all", workers=None)
    assert (first.name, second.name) == ("node7-gpu4", "node7-gpu6")
    assert second.env == {
        "CUDA_VISIBLE_DEVICES": "6",
        "FARM_DEVICE": "cuda",
        "FARM_METRICS_PORT": "9401",
        "OMP_NUM_THREADS": "3",
    }


def test_workers_on_the_cpu_see_no_gpu() -> None:
    (only,) = seats({}, settings(), None, gpus=None, workers=1)
    assert (only.name, only.env["CUDA_VISIBLE_DEVICES"], only.env["FARM_DEVICE"]) == ("cpu0", "", "cpu")
    with pytest.raises(NotConfigured, match="at least one"):
        seats({}, settings(), None, gpus=None, workers=0)


def test_a_device_s_number_is_not_given_twice() -> None:
    with pytest.raises(NotConfigured, match="cuda:1"):
        seats({"CUDA_VISIBLE_DEVICES": "0,1"}, settings(device="cuda:1"), None, gpus="all", workers=None)

"""Deployment of workers: the systemd units and the Slurm script."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from farm.settings import Settings
from tests.integration.conftest import wait_until
from workers.service.supervisor import REFUSED, STOP_MARGIN_SECONDS

INFRA = Path(__file__).parents[2] / "infra"
UNITS = sorted((INFRA / "systemd").glob("*.service"))
DRAIN_SECONDS = Settings(database_url="", broker_url="", s3_bucket="").drain_seconds


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_takes_the_unit(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    farm = Path(sys.executable).with_name("farm")
    there = tmp_path / unit.name
    there.write_text(unit.read_text().replace("/opt/diffusion-farm/bin/farm", str(farm)))
    said = subprocess.run(["systemd-analyze", "verify", there], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stderr) == (0, "")
    exposed = ["systemd-analyze", "security", "--offline=yes", "--threshold=40", "--no-pager", there]
    subprocess.run(exposed, capture_output=True, check=True)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_waits_for_the_drain_and_starts_nothing_that_was_refused(unit: Path) -> None:
    text = unit.read_text()
    assert f"RestartPreventExitStatus={REFUSED}\n" in text
    assert "Environment=FARM_ENV_FILE=" in text
    if "farm worker" in text:
        (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
        assert int(seconds) > DRAIN_SECONDS + STOP_MARGIN_SECONDS
        assert "KillMode=mixed\n" in text


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)], ids=["time is over", "told to stop"]
)
def test_a_slurm_job_drains_and_goes_on_later_if_its_time_was_over(
    tmp_path: Path, number: signal.Signals, requeued: bool
) -> None:
    program(tmp_path / "scontrol", f'echo "$@" > {tmp_path}/scontrol.said')
    program(
        tmp_path / "farm",
        f"trap 'sleep 0.3; echo drained >> {tmp_path}/farm.said; exit 0' TERM",
        f'echo "$@ $FARM_ENV_FILE" > {tmp_path}/farm.said',
        "while :; do sleep 0.05; done",
    )
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": "/home/me", "FARM": f"{tmp_path}/farm"}
    job = subprocess.Popen(
        [INFRA / "slurm" / "farm-worker.sbatch", "--models", "tiny"],
        env={**environ, "SLURM_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "3"},
    )
    wait_until(lambda: (tmp_path / "farm.said").exists() and (tmp_path / "farm.said").stat().st_size > 0, "it runs")
    job.send_signal(number)
    assert job.wait(20) == 0
    assert (tmp_path / "farm.said").read_text().splitlines() == [
        "worker --gpus all --name slurm-4711 --models tiny /home/me/.config/diffusion-farm/farm.env",
        "drained",
    ]
    said = tmp_path / "scontrol.said"
    assert (said.read_text() if said.exists() else "") == ("requeue 4711\n" if requeued else "")


def test_a_slurm_job_ends_as_its_worker_does(tmp_path: Path) -> None:
    program(tmp_path / "farm", f"exit {REFUSED}")
    environ = {"PATH": os.environ["PATH"], "HOME": "/", "FARM": f"{tmp_path}/farm", "SLURM_JOB_ID": "1"}
    job = subprocess.run([INFRA / "slurm" / "farm-worker.sbatch"], env=environ, check=False)
    assert job.returncode == REFUSED


def test_slurm_leaves_time_for_the_drain() -> None:
    text = (INFRA / "slurm" / "farm-worker.sbatch").read_text()
    subprocess.run(["bash", "-n", "-c", text], check=True)
    (grace,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE)
    (drain,) = re.findall(r"FARM_DRAIN_SECONDS:-(\d+)", text)
    assert int(grace) >= int(drain) + STOP_MARGIN_SECONDS + 30  # 30 s for Slurm to send its signal


def program(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)

"""A job too large for every worker: told at submit and in the status, and rendered by a worker that comes up later."""

import subprocess
import sys

import pytest

from farm.client import Farm
from farm.states import JobState
from tests.integration.conftest import Crew, environment, wait_until


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_size_that_no_worker_can_take_waits_with_the_reason_until_one_can(farm: Farm, crew: Crew) -> None:
    crew.worker("small", "tiny=null:?most_pixels=8192")
    crew.dispatcher()
    first = farm.submit(["x"], width=128, height=128, num_inference_steps=2)
    wait_until(lambda: bool(farm.too_large(first.id)), "its worker has found out")
    batch = farm.submit(["a", "b"], width=256, height=256, num_inference_steps=2)
    others = farm.submit(["c"], width=64, height=64, num_inference_steps=2)
    assert others.wait(30).counts[JobState.SUCCEEDED] == 1
    assert batch.status().counts[JobState.PENDING] == 2
    for arguments in (["status", batch.id], ["submit", "d", "--width", "256", "--height", "256", "--steps", "1"]):
        said = subprocess.run(
            [sys.executable, "-m", "farm", *arguments], env=environment(crew.settings), capture_output=True, text=True
        )
        assert said.returncode == 0
        assert "no worker has the memory for tiny beyond 32,767 pixels (16,383 with guidance) now" in said.stderr
    assert [job.info.attempt for job in batch] == [0, 0]
    crew.worker("large", "tiny=null:")
    for each in (batch, first):
        assert each.wait(60).counts[JobState.SUCCEEDED] == each.total
    assert farm.too_large() == {}

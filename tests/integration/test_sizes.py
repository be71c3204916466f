"""A job too large for every worker: told at submit and in the status, and rendered by a worker that comes up later."""

import subprocess
import sys

import pytest

from farm.client import Farm
from farm.states import JobState
from tests.integration.conftest import Crew, environment, wait_until


def complaint(crew: Crew, *arguments: str) -> str:
    """What a command, which succeeds, has to say beside its output."""
    done = subprocess.run(
        [sys.executable, "-m", "farm", *arguments], env=environment(crew.settings), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


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
        said = complaint(crew, *arguments)
        assert "no worker has the memory for tiny beyond 32,767 pixels (16,383 with guidance) now" in said
    assert [job.info.attempt for job in batch] == [0, 0]
    crew.worker("large", "tiny=null:")
    for each in (batch, first):
        assert each.wait(60).counts[JobState.SUCCEEDED] == each.total
    assert farm.too_large() == {}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_size_beyond_the_memory_is_told_at_the_first_submit_and_never_tried_there(farm: Farm, crew: Crew) -> None:
    crew.worker("small", "tiny=tiny", memory=str(3 * 2**20))
    crew.dispatcher()
    large = ["--width", "4096", "--height", "4096", "--steps", "2"]
    said = complaint(crew, "submit", "a", *large)
    # A forward of the small model takes 192 bytes a pixel and row, and its weights 29 MB.
    assert "no worker has the memory for tiny beyond 17,334,271 pixels (8,667,135 with guidance) now" in said
    batch = farm.batch(farm.batches()[0].id)
    others = farm.submit(["c"], width=64, height=64, num_inference_steps=2)
    assert others.wait(60).counts[JobState.SUCCEEDED] == 1
    assert [job.info.attempt for job in batch] == [0]
    crew.worker("large", "tiny=null:")
    assert "memory" not in complaint(crew, "submit", "b", *large)
    again = farm.batch(farm.batches()[0].id)
    for each in (batch, again):
        assert each.wait(60).counts[JobState.SUCCEEDED] == 1
        assert [job.info.tries for job in each] == [0]

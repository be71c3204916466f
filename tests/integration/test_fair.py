"""A small batch behind a very large one, with a real dispatcher and a real worker."""

import time

from farm.client.farm import Farm
from farm.jobs.states import JobState
from tests.integration.conftest import Crew, wait_until
from tests.servers import BOTH_KINDS_IN_TIME

pytestmark = BOTH_KINDS_IN_TIME


def test_a_ten_job_batch_behind_a_large_one_starts_within_seconds(crew: Crew, farm: Farm) -> None:
    crew.dispatcher()
    crew.worker(models="tiny=null:?seconds_per_step=0.01", slots=4)
    large = farm.submit((f"large {n}" for n in range(30_000)), num_inference_steps=25)
    wait_until(lambda: large.status().counts[JobState.RUNNING] > 0, "the large batch renders")
    began = time.monotonic()
    small = farm.submit([f"small {n}" for n in range(10)], num_inference_steps=25)

    def started() -> int:
        counts = small.status().counts
        return counts[JobState.RUNNING] + counts[JobState.SUCCEEDED]

    wait_until(lambda: started() > 0, "the small batch has started")
    assert time.monotonic() - began < 30  # the large batch takes half an hour
    wait_until(lambda: started() == 10, "all of the small batch have started")
    counts = large.status().counts
    assert counts[JobState.PENDING] > 25_000
    assert counts[JobState.QUEUED] <= 8
    large.cancel()

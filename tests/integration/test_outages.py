"""How workers behave while a service is away."""

import sqlite3
import time

import pytest

from farm.client.farm import Farm
from farm.jobs.states import JobState
from tests.integration.conftest import Crew, wait_until

SLOW = "tiny=null:?seconds_per_step=0.05"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.long
def test_a_worker_that_can_not_renew_stops_its_renders_before_the_lease_runs_out(farm: Farm, crew: Crew) -> None:
    crew.settings = crew.settings.model_copy(update={"lease_seconds": 6.0, "beat_seconds": 2.0})
    worker = crew.worker("w1", SLOW)
    crew.dispatcher()
    batch = farm.submit(["one", "two"], num_inference_steps=130)
    wait_until(lambda: batch.status().counts[JobState.RUNNING] == 2, "both are rendered")
    # The database hangs without an error: a write transaction stays open.
    writer = sqlite3.connect(str(crew.settings.database_url).removeprefix("sqlite:///"), isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    hung = time.monotonic()
    wait_until(lambda: worker.log.read_text().count("lease not renewed") == 2, "both are stopped", seconds=20)
    took = time.monotonic() - hung
    writer.execute("ROLLBACK")
    writer.close()
    assert took < crew.settings.lease_seconds
    assert batch.wait(60).counts[JobState.SUCCEEDED] == 2
    for job in batch:
        assert [one.outcome for one in job.attempts()] == ["lost", "succeeded"]

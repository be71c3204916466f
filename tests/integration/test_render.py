"""The whole path with real processes, including their crashes: submit, dispatch, claim, render, upload, finish."""

from itertools import islice

import pytest
import redis

from farm.client.farm import Batch, Farm
from farm.errors import JobNotSucceeded
from farm.jobs.states import JobState
from farm.objects.storage import Storage
from farm.specs.object_keys import manifest_key
from tests.integration.conftest import Crew, wait_until
from tests.servers import BOTH_KINDS_IN_TIME

pytestmark = BOTH_KINDS_IN_TIME

SLOW = "tiny=null:?seconds_per_step=0.05"


def ended_well(farm: Farm, batch: Batch) -> None:
    """Check that every job succeeded, every picture matches SQL, and the bucket holds no other objects."""
    status = batch.wait(90)
    assert status.counts[JobState.SUCCEEDED] == batch.total
    keys = set()
    for job in batch:
        picture = job.picture
        assert picture is not None
        assert job.image().size == (picture.width, picture.height)  # `image` checks the SHA-256
        keys.add(picture.key)
    storage = Storage(farm.settings)
    assert set(storage.keys(f"{batch.id}/")) - {manifest_key(batch.id)} == keys
    storage.close()


def running(batch: Batch, count: int = 1) -> None:
    """Wait until this many jobs of a batch are running."""
    wait_until(lambda: batch.status().counts[JobState.RUNNING] >= count, f"{count} jobs running")


def test_a_batch_is_rendered_and_every_picture_is_what_sql_says(farm: Farm, crew: Crew) -> None:
    crew.dispatcher()
    crew.worker()
    batch = farm.submit([f"prompt {n}" for n in range(20)], name="first", num_inference_steps=3)
    ended_well(farm, batch)
    assert {job.info.attempt for job in batch} == {1}


def test_a_small_batch_needs_no_standing_dispatcher(farm: Farm, crew: Crew) -> None:
    crew.worker()
    ended_well(farm, farm.submit(["one", "two"], num_inference_steps=2))


def test_a_worker_killed_mid_render_loses_no_job(farm: Farm, crew: Crew) -> None:
    crew.dispatcher()
    first = crew.worker("w1", SLOW)
    batch = farm.submit([f"prompt {n}" for n in range(12)], num_inference_steps=20)
    running(batch, 4)
    first.kill()
    crew.worker("w2", SLOW)
    ended_well(farm, batch)
    assert max(job.info.attempt for job in batch) == 2
    assert {job.info.tries for job in batch} == {0}


@pytest.mark.long
def test_a_frozen_worker_changes_nothing_when_it_wakes(farm: Farm, crew: Crew) -> None:
    crew.dispatcher()
    zombie = crew.worker("w1", "tiny=null:?seconds_per_step=0.2")
    batch = farm.submit([f"prompt {n}" for n in range(4)], num_inference_steps=20)
    running(batch, 4)
    with crew.frozen(zombie):
        wait_until(lambda: batch.status().counts[JobState.RUNNING] == 0, "all leases expired")
        crew.worker("w2", SLOW)
        wait_until(lambda: batch.status().counts[JobState.PENDING] == 0, "w2 has the jobs")
    ended_well(farm, batch)
    assert {job.info.attempt for job in batch} == {2}  # the zombie finished none of its lost jobs


def test_flushing_redis_loses_no_job(farm: Farm, crew: Crew) -> None:
    crew.dispatcher()
    crew.worker("w1", SLOW)
    batch = farm.submit([f"prompt {n}" for n in range(40)], num_inference_steps=5)
    running(batch)
    with redis.Redis.from_url(farm.settings.broker_url) as client:
        wait_until(lambda: client.keys("render.tiny*"), "Redis holds messages")
        client.flushall()
    ended_well(farm, batch)


def test_a_stopping_worker_hands_back_what_it_can_not_finish(farm: Farm, crew: Crew) -> None:
    crew.dispatcher()
    first = crew.worker("w1", "tiny=null:?seconds_per_step=0.2", FARM_DRAIN_SECONDS="0.5")
    batch = farm.submit([f"prompt {n}" for n in range(4)], num_inference_steps=1000)
    running(batch, 4)
    assert first.stop() == 0
    status = batch.status()
    assert status.counts[JobState.RUNNING] == 0
    assert not [one for one in farm.workers() if one.name.startswith("w1@")]
    assert {job.info.tries for job in batch} == {0}
    assert "Traceback" not in first.log.read_text()
    batch.cancel()


def test_a_cancelled_batch_stops_within_a_beat(farm: Farm, crew: Crew) -> None:
    crew.dispatcher()
    crew.worker("w1", SLOW)
    batch = farm.submit([f"prompt {n}" for n in range(50)], num_inference_steps=1000)
    running(batch, 4)
    assert batch.cancel() == 50
    status = batch.wait(20)
    assert status.counts[JobState.CANCELLED] == 50
    with pytest.raises(JobNotSucceeded, match="cancelled"):
        next(iter(batch)).image()
    ended_well(farm, farm.submit(["the slots are free again"], num_inference_steps=2))


def test_a_job_for_a_model_nobody_holds_waits_and_holds_up_nobody(farm: Farm, crew: Crew) -> None:
    crew.dispatcher()
    crew.worker("w1", "tiny=null:,other=null:")
    batch = farm.submit(
        ["good", {"prompt": "for a model nobody holds", "model": "nobody"}, {"prompt": "other", "model": "other"}],
        num_inference_steps=2,
    )
    ended = [job.spec.prompt for job in islice(batch.as_completed(60), 2)]
    assert sorted(ended) == ["good", "other"]
    assert farm.waiting() == {"nobody": 1}
    batch.cancel()
    assert batch.wait(10).counts[JobState.CANCELLED] == 1

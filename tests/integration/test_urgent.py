"""Urgent jobs through the whole farm while bulk jobs fill a worker's slots and threads and the queue."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from farm.client.farm import Batch, Farm
from farm.jobs.states import JobState
from farm.queue.broker import Broker
from farm.settings import Settings
from farm.specs.spec import URGENT
from tests.integration.conftest import Crew, wait_until

SLOTS = 2
THREADS = SLOTS + 2
WINDOW = 2 * SLOTS
PACED = "tiny=null:?seconds_per_step=0.05"


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One kind of database is enough here."""
    return sqlite_url


@pytest.fixture
def crew(settings: Settings, tmp_path: Path) -> Iterator[Crew]:
    """A crew with long leases: no process dies in these tests, so none may expire even if the machine stalls."""
    crew = Crew(settings.model_copy(update={"lease_seconds": 600.0, "beat_seconds": 0.4}), tmp_path)
    yield crew
    crew.end()


@pytest.fixture
def bulk(farm: Farm, crew: Crew) -> Batch:
    """As many long jobs as the worker takes at once, all running."""
    crew.dispatcher()
    crew.worker("w1", PACED, slots=SLOTS)
    long = farm.submit([f"long {n}" for n in range(THREADS)], num_inference_steps=1000)
    wait_until(lambda: long.status().counts[JobState.RUNNING] == THREADS, "all ordinary threads busy")
    return long


@pytest.fixture
def queued(farm: Farm, bulk: Batch) -> Batch:
    """More bulk jobs behind those: the window is full."""
    return farm.submit([f"short {n}" for n in range(2 * THREADS)], num_inference_steps=2, priority=URGENT - 1)


@pytest.fixture
def broker(farm: Farm) -> Iterator[Broker]:
    broker = Broker(farm.settings)
    yield broker
    broker.close()


def waits(batch: Batch) -> bool:
    """Whether no job of a batch was taken from the queue."""
    counts = batch.status().counts
    return counts[JobState.QUEUED] == WINDOW and counts[JobState.PENDING] == batch.total - WINDOW


def runs(batch: Batch) -> bool:
    """Whether all jobs of a batch are running."""
    return batch.status().counts[JobState.RUNNING] == batch.total


def steps_done(batch: Batch) -> int:
    return sum(job.info.steps_done for job in batch)


def ended_well(batch: Batch) -> None:
    assert batch.wait(20).counts[JobState.SUCCEEDED] == batch.total


def test_an_urgent_job_is_rendered_while_no_bulk_job_ends(farm: Farm, bulk: Batch, queued: Batch) -> None:
    ended_well(farm.submit(["now"], num_inference_steps=3, priority=URGENT))
    assert runs(bulk)
    assert waits(queued)


def test_urgent_jobs_pass_the_bulk_together_and_are_all_done_though_more_than_there_are_threads(
    farm: Farm, bulk: Batch, queued: Batch
) -> None:
    urgent = farm.submit([f"now {n}" for n in range(3 * THREADS)], num_inference_steps=20, priority=100)
    wait_until(lambda: sum(0 < job.info.steps_done < 20 for job in urgent) == SLOTS, "urgent jobs have all slots")
    ended_well(urgent)
    assert runs(bulk)
    assert waits(queued)
    before = steps_done(bulk)
    wait_until(lambda: steps_done(bulk) > before, "the bulk goes on")
    assert waits(queued)  # ordinary jobs do not use the threads of urgent jobs


def test_urgent_jobs_take_no_thread_from_the_bulk_and_no_more_than_there_are(
    farm: Farm, bulk: Batch, queued: Batch, broker: Broker
) -> None:
    urgent = farm.submit([f"now {n}" for n in range(THREADS + 3)], num_inference_steps=1000, priority=URGENT)
    wait_until(lambda: steps_done(urgent) >= 20, "urgent jobs run")
    wait_until(lambda: urgent.status().counts[JobState.RUNNING] == THREADS, "they have all urgent threads")
    waiting = {job.id for job in [*list(queued)[:WINDOW], *list(urgent)[THREADS:]]}
    wait_until(lambda: broker.waiting("tiny") == waiting, "all the others wait in Redis")
    for job in list(urgent)[THREADS:] + list(bulk)[1:]:
        job.cancel()
    wait_until(lambda: queued.status().counts[JobState.RUNNING] == THREADS - 1, "bulk takes the ordinary threads")
    urgent.cancel()
    ended_well(queued)
    assert {job.info.attempt for job in queued} == {1}


def test_a_worker_whose_redis_restarts_still_takes_urgent_jobs_and_nothing_it_has_no_thread_for(
    farm: Farm, bulk: Batch, queued: Batch
) -> None:
    urgent = farm.submit(["before"], num_inference_steps=1000, priority=URGENT)
    wait_until(lambda: runs(urgent), "an urgent job runs")
    with redis.Redis.from_url(farm.settings.broker_url) as client:
        client.shutdown(nosave=True)  # the embedded farm restarts it with its data
        wait_until(lambda: answers(client), "Redis is back")
    ended_well(farm.submit([f"after {n}" for n in range(THREADS + 1)], num_inference_steps=3, priority=URGENT))
    assert runs(urgent)
    assert runs(bulk)
    assert waits(queued)
    urgent.cancel()
    bulk.cancel()
    ended_well(queued)


def test_a_worker_stops_with_urgent_jobs_under_way(farm: Farm, crew: Crew) -> None:
    worker = crew.worker("w1", PACED, slots=1, FARM_DRAIN_SECONDS="0.5")
    bulk = farm.submit(["long"] * 3, num_inference_steps=1000)
    wait_until(lambda: runs(bulk), "all ordinary threads busy")
    urgent = farm.submit(["now"], num_inference_steps=1000, priority=URGENT)
    wait_until(lambda: runs(urgent), "the urgent job runs")
    assert worker.stop() == 0
    for batch in (bulk, urgent):
        assert batch.status().counts[JobState.RUNNING] == 0
        assert {job.info.tries for job in batch} == {0}
    assert "Traceback" not in worker.log.read_text()


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False

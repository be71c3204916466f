"""Objects that a dead or fenced-off worker leaves in the bucket without a record in SQL are swept."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from farm.client.farm import Farm
from farm.dispatch.dispatcher import Dispatcher
from farm.errors import DatabaseUnavailable
from farm.jobs.attempts import Attempts
from farm.jobs.database import Database
from farm.jobs.records import Claim, Picture
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.queue.broker import Broker
from farm.settings import Settings
from farm.specs.object_keys import checkpoint_key, image_key, manifest_key
from farm.specs.spec import RenderSpec
from tests.integration.conftest import Crew, wait_until
from workers.engine.engine import Engine
from workers.models.pins import Pins
from workers.pipelines.null import NullPipeline
from workers.render.request import Snapshot
from workers.service.observer import Observer

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def dispatcher(settings: Settings, database: Database, storage: Storage) -> Iterator[Dispatcher]:
    broker = Broker(settings)
    yield Dispatcher(JobStore.over(database, settings), broker, storage, settings)
    broker.close()


@pytest.fixture
def crew(settings: Settings, tmp_path: Path) -> Iterator[Crew]:
    crew = Crew(settings.model_copy(update={"lease_seconds": 4.0, "beat_seconds": 0.4}), tmp_path)
    yield crew
    crew.end()


def test_the_checkpoint_of_a_job_whose_worker_died_after_its_success_is_swept(
    settings: Settings, database: Database, storage: Storage, dispatcher: Dispatcher
) -> None:
    store = JobStore.over(database, settings)
    store.submissions.submit("batch", "me", 50, [RenderSpec(prompt="x")])
    (bell,) = store.backlog.enqueue(10).queued
    claim = store.leases.claim(bell.job_id, "w1@host")
    assert claim is not None
    state = checkpoint_key(claim.batch_id, claim.index, claim.attempt)
    storage.put(state, b"state")
    store.attempts.record_checkpoint(claim, state)
    key = image_key(claim.batch_id, claim.index, claim.attempt, "x")
    storage.put(key, b"picture")
    picture = Picture(key, hashlib.sha256(b"picture").hexdigest(), 7, 64, 64, "0" * 64, 1.0)
    assert store.attempts.succeed(claim, picture)
    # Here its worker dies, or can't reach the object store.
    dispatcher.sweep()
    assert list(storage.keys()) == [key]


def test_a_checkpoint_that_was_not_recorded_because_sql_was_away_is_swept(
    settings: Settings, database: Database, storage: Storage, dispatcher: Dispatcher
) -> None:
    class Away(Attempts):
        def record_checkpoint(self, claim: Claim, key: str) -> bool:
            raise DatabaseUnavailable(f"{claim.job_id} and {key} can't be recorded")

    store = JobStore.over(database, settings)
    store.submissions.submit("batch", "me", 50, [RenderSpec(prompt="x")])
    (bell,) = store.backlog.enqueue(10).queued
    claim = store.leases.claim(bell.job_id, "w1@host")
    assert claim is not None
    away = Away(database, settings)
    observer = Observer(Engine(Pins.of({"tiny": NullPipeline()})), storage, away, settings)
    observer.checkpoint(observer.open(claim), snapshot(claim.spec))
    observer.stop()
    assert list(storage.keys()) == [checkpoint_key(claim.batch_id, claim.index, claim.attempt)]
    key = image_key(claim.batch_id, claim.index, claim.attempt, "x")
    storage.put(key, b"picture")
    assert store.attempts.succeed(claim, Picture(key, hashlib.sha256(b"picture").hexdigest(), 7, 64, 64, "0" * 64, 1.0))
    # Here its worker can't reach the object store.
    dispatcher.sweep()
    assert list(storage.keys()) == [key]


@pytest.mark.long
def test_the_picture_of_an_attempt_whose_worker_died_before_its_success_is_deleted(
    crew: Crew, database: Database, storage: Storage, dispatcher: Dispatcher
) -> None:
    first = crew.worker("w1", "tiny=null:?seconds_per_step=0.1")
    with Farm(crew.settings) as farm:
        batch = farm.submit(RenderSpec(prompt="x", num_inference_steps=15))
        (job,) = batch
        wait_until(lambda: job.refresh().state is JobState.RUNNING, "it is rendered")
        with database.write():  # hold SQLite's write lock: the worker can upload its picture, but not record it
            wait_until(lambda: ".a1.png" in str(list(storage.keys())), "its picture is uploaded")
            first.kill()
        crew.dispatcher()
        crew.worker("w2", "tiny=null:")
        assert job.wait(60).state is JobState.SUCCEEDED
        assert job.info.attempt == 2

        def swept() -> bool:
            dispatcher.sweep()
            return set(storage.keys()) - {manifest_key(batch.id)} == {job.picture.key}

        wait_until(swept, "nothing but the picture is left", 5)


def test_a_worker_that_lost_its_lease_leaves_the_checkpoint_that_the_next_attempt_goes_on_from(
    settings: Settings, database: Database, storage: Storage
) -> None:
    store = JobStore.over(database, settings.model_copy(update={"lease_seconds": 0.001}))
    store.submissions.submit("batch", "me", 50, [RenderSpec(prompt="x")])
    (bell,) = store.backlog.enqueue(10).queued
    claim = store.leases.claim(bell.job_id, "w1@host")
    assert claim is not None
    zombie = Observer(Engine(Pins.of({"tiny": NullPipeline()})), storage, store.attempts, settings)
    observation = zombie.open(claim)
    zombie.checkpoint(observation, snapshot(claim.spec))
    wait_until(lambda: store.leases.expire() == 1, "its lease is lost")
    zombie.checkpoint(observation, snapshot(claim.spec))
    zombie.stop()
    store.backlog.enqueue(10)
    following = store.leases.claim(bell.job_id, "w2@host")
    assert following is not None
    assert following.checkpoint_key in list(storage.keys())


@pytest.mark.long
def test_a_checkpoint_that_a_frozen_worker_ends_writing_after_the_sweep_is_swept_all_the_same(
    crew: Crew, database: Database, storage: Storage, dispatcher: Dispatcher
) -> None:
    zombie = crew.worker("w1", "tiny=null:?seconds_per_step=0.5", FARM_CHECKPOINT_STEPS="1")
    with Farm(crew.settings) as farm:
        batch = farm.submit(RenderSpec(prompt="x", num_inference_steps=1000))
        (job,) = batch

        def kept() -> bool:
            return any("checkpoint" in key for key in list(storage.keys()))

        wait_until(kept, "it is checkpointed")
        with crew.frozen(zombie):
            batch.cancel()
            crew.dispatcher()
            assert job.wait(60).state is JobState.CANCELLED
            wait_until(lambda: not kept(), "its checkpoint is swept", 30)
            # The upload that was in flight when the worker froze.
            storage.put(checkpoint_key(batch.id, 1, 1), b"state")
        wait_until(lambda: not kept(), "the late checkpoint is swept too", 30)


def snapshot(spec: RenderSpec) -> Snapshot:
    return Snapshot(spec, "0" * 64, 1, 1, torch.zeros(1, 3, 8, 8), (), torch.Generator().get_state(), {})

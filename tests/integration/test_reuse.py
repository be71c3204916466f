"""Reuse with real workers and a real object store: equal jobs are rendered once, and pictures are copied."""

import hashlib
import threading

import pytest
import sqlalchemy as sa

from farm.client.farm import Batch, Farm
from farm.dispatch.copier import Copier
from farm.dispatch.dispatcher import Dispatcher
from farm.errors import StorageUnavailable
from farm.jobs.database import Database
from farm.jobs.leadership import Leadership
from farm.jobs.records import Picture, WorkerInfo
from farm.jobs.schema import AttemptRow, LeaderRow
from farm.jobs.served_models import ServedModel
from farm.jobs.states import JobState, Outcome
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.queue.broker import Broker
from farm.settings import Settings
from farm.specs.object_keys import image_key
from farm.specs.spec import RenderSpec
from tests.integration.conftest import Crew, wait_until
from tests.integration.test_render import SLOW, ended_well, running
from tests.integration.test_steering import farm_says
from tests.servers import BOTH_KINDS_IN_TIME

WEIGHTS = "e" * 64
SPEC = RenderSpec(prompt="a boat", seed=1, num_inference_steps=2)


@pytest.fixture
def crew(crew: Crew, database: Database) -> Crew:
    """A crew with a leading dispatcher."""

    def led() -> bool:
        with database.read() as session:
            return session.scalar(sa.select(LeaderRow.holder)) is not None

    crew.dispatcher()
    wait_until(led, "a dispatcher leads")
    return crew


def rendered_by(database: Database, *batches: Batch) -> dict[str, str | None]:
    """Worker of the successful attempt of each job; None for a copy."""
    with database.read() as session:
        rows = session.execute(
            sa.select(AttemptRow.job_id, AttemptRow.worker).where(AttemptRow.outcome == Outcome.SUCCEEDED.value)
        )
        found = {row.job_id: row.worker for row in rows}
    return {job_id: worker for job_id, worker in found.items() if any(job_id.startswith(one.id) for one in batches)}


@BOTH_KINDS_IN_TIME
def test_twins_in_flight_are_rendered_once_and_each_has_its_own_picture(
    farm: Farm, crew: Crew, database: Database
) -> None:
    crew.worker("w1", SLOW)
    first = farm.submit(["a boat"] * 30, seed=1, num_inference_steps=10)
    running(first)
    second = farm.submit(["a boat", "a cat"], seed=1, num_inference_steps=10)
    ended_well(farm, first)
    ended_well(farm, second)
    by = rendered_by(database, first, second)
    assert {job_id for job_id, worker in by.items() if worker is not None} == {f"{first.id}-1", f"{second.id}-2"}
    jobs = [*first, *second]
    assert len({job.picture.key for job in jobs if job.picture}) == 32
    assert len({job.picture.sha256 for job in jobs if job.picture}) == 2
    shown = farm_says(crew, "show", f"{second.id}-1")
    assert f"copy of {first.id}-1" in " ".join(shown.split())


@BOTH_KINDS_IN_TIME
def test_a_copy_has_the_trajectory_too_and_outlives_what_it_is_of(farm: Farm, crew: Crew, database: Database) -> None:
    crew.worker()
    spec = SPEC.model_copy(update={"trajectory": True, "num_inference_steps": 4})
    first = farm.submit(spec)
    first.wait(60)
    second = farm.submit(spec)
    second.wait(60)
    assert list(rendered_by(database, second).values()) == [None]
    storage = Storage(farm.settings)
    # The prefix leaves out the manifest of each batch.
    originals, copies = (list(storage.keys(f"{one.id}/0")) for one in (first, second))
    assert len(copies) == 3
    assert [storage.get(key) for key in copies] == [storage.get(key) for key in originals]
    storage.delete_many(originals)
    job = next(iter(second))
    assert job.picture is not None
    assert hashlib.sha256(storage.get(job.picture.key)).hexdigest() == job.picture.sha256
    storage.close()


@BOTH_KINDS_IN_TIME
def test_a_twin_that_is_cancelled_or_loses_its_worker_lets_the_work_be_done_all_the_same(
    farm: Farm, crew: Crew, database: Database
) -> None:
    worker = crew.worker("w1", SLOW)
    batch = farm.submit(["a boat"] * 5, seed=1, num_inference_steps=40)
    running(batch)
    farm.job(f"{batch.id}-1").cancel()
    wait_until(lambda: farm.job(f"{batch.id}-2").state is JobState.RUNNING, "the next one is rendered")
    worker.kill()
    crew.worker("w2", "tiny=null:?seconds_per_step=0.05")
    status = batch.wait(90)
    assert (status.counts[JobState.SUCCEEDED], status.counts[JobState.CANCELLED]) == (4, 1)
    assert len([name for name in rendered_by(database, batch).values() if name is not None]) == 1


@BOTH_KINDS_IN_TIME
def test_other_weights_a_picture_that_is_gone_and_no_reuse_are_rendered(
    farm: Farm, crew: Crew, database: Database
) -> None:
    worker = crew.worker("w1", "tiny=null:")
    first = farm.submit(SPEC)
    ended_well(farm, first)
    storage = Storage(farm.settings)
    storage.delete_many(storage.keys(f"{first.id}/"))
    second = farm.submit(SPEC)
    ended_well(farm, second)
    assert None not in rendered_by(database, second).values()
    third = farm.submit([SPEC, SPEC], reuse=False)
    ended_well(farm, third)
    assert None not in rendered_by(database, third).values()
    farm_says(crew, "submit", "a boat", "--seed", "1", "--steps", "2", "--no-reuse", "--wait", "--name", "shell")
    assert None not in rendered_by(database, farm.batch("shell")).values()
    assert worker.stop() == 0
    crew.worker("w2", "tiny=null:?seconds_per_step=0.001")
    fourth = farm.submit(SPEC)
    ended_well(farm, fourth)
    assert None not in rendered_by(database, fourth).values()
    assert next(iter(fourth)).info.reused_from is None
    fifth = farm.submit(SPEC)
    ended_well(farm, fifth)
    assert next(iter(fifth)).info.reused_from == f"{fourth.id}-1"
    storage.close()


@pytest.fixture
def store(database: Database, settings: Settings) -> JobStore:
    """A store with a registered worker and a leading dispatcher."""
    Leadership(database, "dispatcher", lease_seconds=600).keep()
    store = JobStore.over(database, settings)
    store.workers.register(WorkerInfo("w1@host", "cpu", "float32", 8, "0", (ServedModel("tiny", sha256=WEIGHTS),)))
    return store


def original(store: JobStore, storage: Storage, data: bytes = b"a picture") -> str:
    """Submit and finish a job; returns its id."""
    store.submissions.submit("original", "me", 50, [SPEC])
    (bell,) = store.backlog.enqueue(10).queued
    claim = store.leases.claim(bell.job_id, "w1@host")
    assert claim is not None
    key = image_key(claim.batch_id, claim.index, claim.attempt, claim.spec.prompt)
    storage.put(key, data, "image/png")
    assert store.attempts.succeed(
        claim, Picture(key, hashlib.sha256(data).hexdigest(), len(data), 64, 64, WEIGHTS, 1.0)
    )
    return claim.job_id


def test_a_copy_keeps_the_kind_of_its_content(store: JobStore, storage: Storage) -> None:
    source = original(store, storage)
    job_id = f"{store.submissions.submit('copy', 'me', 50, [SPEC])}-1"
    assert Copier(store.reuse, storage).copy({job_id: source}) == 1
    key = store.queries.job(job_id).picture.key
    assert storage._s3.head_object(Bucket=storage.bucket, Key=key)["ContentType"] == "image/png"


def test_a_copy_that_comes_too_late_leaves_no_object(
    store: JobStore, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = original(store, storage)
    batch_id = store.submissions.submit("copy", "me", 50, [SPEC])
    copy = storage.copy

    def cancelled_meanwhile(*args: object) -> bool:
        made = copy(*args)
        store.steering.cancel(batch_id=batch_id)
        return made

    monkeypatch.setattr(storage, "copy", cancelled_meanwhile)
    assert Copier(store.reuse, storage).copy({f"{batch_id}-1": source}) == 0
    assert list(storage.keys(batch_id)) == []
    assert store.queries.job(f"{batch_id}-1").state is JobState.CANCELLED


def test_a_picture_of_another_size_than_sql_says_serves_nobody(store: JobStore, storage: Storage) -> None:
    source = original(store, storage)
    storage.put(store.queries.job(source).picture.key, b"half a")
    job_id = f"{store.submissions.submit('copy', 'me', 50, [SPEC])}-1"
    assert Copier(store.reuse, storage).copy({job_id: source}) == 0
    found = store.backlog.enqueue(10, copy=True)
    assert ([bell.job_id for bell in found.queued], found.copies) == ([job_id], {})


def test_while_the_object_store_is_away_what_could_be_copied_is_rendered(
    store: JobStore, storage: Storage, settings: Settings, database: Database
) -> None:
    source = original(store, storage)
    broker, stop = Broker(settings), threading.Event()
    away = Storage(settings.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:1"}))
    job_id = f"{store.submissions.submit('copy', 'me', 50, [SPEC])}-1"
    with pytest.raises(StorageUnavailable):
        Copier(store.reuse, away).copy({job_id: source})
    assert store.queries.job(job_id).state is JobState.PENDING
    leadership = Leadership(database, "dispatcher")
    with database.write() as session:
        session.execute(sa.delete(LeaderRow))
    standing = threading.Thread(target=Dispatcher(store, broker, away, settings).run, args=(stop, leadership))
    standing.start()
    wait_until(lambda: store.backlog.queued("tiny") == [job_id], "the job is queued for rendering")
    stop.set()
    standing.join()
    away.close()
    broker.close()

"""The dispatcher with a real database and Redis: the window, lost messages, outages."""

import json
import socket
import threading
from contextlib import closing

import pytest
import redis
import sqlalchemy as sa

from farm.client.farm import Farm
from farm.dispatch import dispatcher as dispatch
from farm.dispatch.dispatcher import Dispatcher
from farm.dispatch.retention import Retention
from farm.errors import BrokerUnavailable, DatabaseUnavailable, ErrorClass, InvalidInput, KeyUsed
from farm.jobs.database import Database, now_plus
from farm.jobs.fair_share import LEAST_WINDOW
from farm.jobs.leadership import Leadership
from farm.jobs.queries import Queries
from farm.jobs.records import WorkerInfo
from farm.jobs.schema import BatchRow
from farm.jobs.served_models import ServedModel
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.queue.broker import Broker, queue_name
from farm.settings import Settings
from farm.specs.object_keys import checkpoint_key
from farm.specs.spec import RenderSpec
from tests.integration.conftest import wait_until

WORKER = WorkerInfo("w1@host", "cpu", "float32", 8, "0", (ServedModel("tiny"),))


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"window": 10, "lease_seconds": 0.2})


def test_submit_puts_a_window_of_jobs_into_redis_before_it_returns(settings: Settings, database: Database) -> None:
    settings = settings.model_copy(update={"lease_seconds": 600.0})  # the worker is alive, however slow the machine
    JobStore.over(database, settings).workers.register(WORKER)
    with Farm(settings) as farm:
        batch = farm.submit([f"prompt {n}" for n in range(25)], priority=100)
        counts = batch.status().counts
        assert (counts[JobState.QUEUED], counts[JobState.PENDING]) == (10, 15)
        with redis.Redis.from_url(settings.broker_url, decode_responses=True) as client:
            messages = [json.loads(message) for message in client.lrange(queue_name("tiny"), 0, -1)]
        # BRPOP takes from the tail.
        assert [message["headers"]["id"] for message in reversed(messages)] == [f"{batch.id}-{n}" for n in range(1, 11)]
        assert all(message["content-type"] == "application/json" for message in messages)


def test_a_few_jobs_wait_in_redis_for_a_worker_that_is_not_there_yet(settings: Settings) -> None:
    with Farm(settings) as farm:
        batch = farm.submit([f"prompt {n}" for n in range(25)])
        assert batch.status().counts[JobState.QUEUED] == LEAST_WINDOW


def test_an_urgent_job_overtakes_what_lies_in_redis(settings: Settings) -> None:
    with Farm(settings) as farm:
        farm.submit(["low"] * 3, priority=0)
        farm.submit(["high"], priority=100)
        with redis.Redis.from_url(settings.broker_url) as client:
            assert client.llen(queue_name("tiny")) == 1
            assert client.llen(f"{queue_name('tiny')}:9") == 3


def test_what_redis_lost_is_brought_back_and_rung_for_again(settings: Settings, database: Database) -> None:
    broker, store = Broker(settings), JobStore.over(database, settings)
    dispatcher = Dispatcher(store, broker, Storage(settings), settings)
    with Farm(settings) as farm:
        batch = farm.submit(["one", "two", "three"])
        assert broker.waiting("tiny") == {job.id for job in batch}
        with redis.Redis.from_url(settings.broker_url) as client:
            client.flushall()
        brought_back = 0
        while brought_back < 3:
            brought_back += dispatcher.recover()
        assert dispatcher.fill() == 3
        assert broker.waiting("tiny") == {job.id for job in batch}
    broker.close()


def test_without_redis_a_batch_is_safe_in_sql(settings: Settings, database: Database) -> None:
    nowhere = settings.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"})
    with Farm(nowhere) as farm:
        batch = farm.submit(["one", "two"])
        assert batch.status().counts[JobState.PENDING] == 2
    broker = Broker(nowhere)
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1"):
        Dispatcher(JobStore.over(database, settings), broker, Storage(settings), settings).fill()
    broker.close()
    broker = Broker(settings)
    assert Dispatcher(JobStore.over(database, settings), broker, Storage(settings), settings).fill() == 2
    broker.close()


def test_a_batch_is_handed_in_whatever_goes_away_after_that(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise DatabaseUnavailable("the database does not answer")

    monkeypatch.setattr("farm.client.farm.fill", away)
    with Farm(settings) as farm:
        assert farm.submit(["one"]).status().counts[JobState.PENDING] == 1
        with monkeypatch.context() as patch:
            patch.setattr(Queries, "batch", away)
            with pytest.raises(
                DatabaseUnavailable, match=r"^batch \S+ is submitted, but the database does not answer$"
            ):
                farm.submit(["two"], name="second")
        assert farm.batch("second").status().total == 1


def test_sweeping_goes_on_whatever_breaks_it_and_batches_end_beside_it(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept, stop = [], threading.Event()

    def sweep(*_: object) -> int:
        swept.append(1)
        raise ValueError("nobody has thought of that")

    def turn(_self: Retention, stop: threading.Event) -> bool:
        if len(swept) == 2:
            stop.set()
        return False

    monkeypatch.setattr(dispatch, "_SWEEP_OUTAGE_SECONDS", 0.01)
    monkeypatch.setattr(Dispatcher, "sweep", sweep)
    monkeypatch.setattr(Retention, "turn", turn)
    with closing(Broker(settings)) as broker, closing(Storage(settings)) as storage:
        dispatcher = Dispatcher(JobStore.over(database, settings), broker, storage, settings)
        leadership = Leadership(database, "dispatcher")
        assert leadership.seek()
        dispatcher._sweep_on(stop, leadership)
    assert len(swept) == 2


def checkpointed(farm: Farm, store: JobStore, storage: Storage, count: int) -> list[str]:
    """Submit jobs, record a checkpoint for each, and let them fail; returns the keys of the checkpoints."""
    farm.submit([f"prompt {n}" for n in range(count)])
    keys = []
    for job_id in store.backlog.queued("tiny"):
        claim = store.leases.claim(job_id, "w1@host")
        assert claim is not None
        keys.append(checkpoint_key(claim.batch_id, claim.index, claim.attempt))
        storage.put(keys[-1], b"state")
        assert store.attempts.record_checkpoint(claim, keys[-1])
        store.attempts.fail(claim, "bad spec", ErrorClass.BAD_INPUT)
    return keys


def test_checkpoints_of_jobs_that_ended_are_swept_and_nothing_else_is(settings: Settings, database: Database) -> None:
    broker, storage, store = Broker(settings), Storage(settings), JobStore.over(database, settings)
    dispatcher = Dispatcher(store, broker, storage, settings)
    with Farm(settings) as farm:
        keys = checkpointed(farm, store, storage, 3)
        farm.submit(["it runs"])
        (job_id,) = store.backlog.queued("tiny")
        claim = store.leases.claim(job_id, "w1@host")
        assert claim is not None
        needed = checkpoint_key(claim.batch_id, claim.index, claim.attempt)
        storage.put(needed, b"state")
        store.attempts.record_checkpoint(claim, needed)
        storage.delete(keys[0])  # deleted already, as by another sweep
        assert dispatcher.sweep() == 3
        assert dispatcher.sweep() == 0
        assert list(storage.keys()) == [needed]
    storage.close()
    broker.close()


@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_an_object_store_that_is_away_holds_up_no_job(settings: Settings, database: Database, how: str) -> None:
    silent = socket.create_server(("127.0.0.1", 0))  # accepts connections, and never answers
    port = silent.getsockname()[1] if how == "hangs" else 1
    nowhere = settings.model_copy(update={"s3_endpoint_url": f"http://127.0.0.1:{port}"})
    broker, away, storage = Broker(settings), Storage(nowhere), Storage(settings)
    store, stop = JobStore.over(database, settings), threading.Event()
    with Farm(settings) as farm:
        checkpointed(farm, store, storage, 1)
    standing = threading.Thread(
        target=Dispatcher(store, broker, away, settings).run, args=(stop, Leadership(database, "dispatcher"))
    )
    standing.start()
    batch_id = store.submissions.submit("later", "me", 50, [RenderSpec(prompt="later")])
    wait_until(
        lambda: store.backlog.queued("tiny") == [f"{batch_id}-1"], "the job is queued", seconds=40
    )  # a hanging request to S3 takes 60 s
    stop.set()
    standing.join()
    assert store.leftovers.find()
    silent.close()
    storage.close()
    away.close()
    broker.close()


def test_a_submission_that_was_broken_off_is_swept(settings: Settings, database: Database) -> None:
    broker, storage, store = Broker(settings), Storage(settings), JobStore.over(database, settings)
    with database.write() as session:
        session.add(
            BatchRow(id="old", name="old", owner="me", priority=50, total=0, created_at=now_plus(sa.literal(-4e3)))
        )
        session.add(
            BatchRow(id="new", name="new", owner="me", priority=50, total=0, created_at=now_plus(sa.literal(-1e3)))
        )
    Dispatcher(store, broker, storage, settings).sweep()
    with database.read() as session:
        assert session.scalars(sa.select(BatchRow.id)).all() == ["new"]
    storage.close()
    broker.close()


def test_handed_in_again_under_its_key_a_submission_is_the_same_batch(settings: Settings) -> None:
    def submit(farm: Farm, **options: object) -> str:
        return farm.submit(["a {red|blue|green} boat", {"prompt": "sea"}], key="monday", wildcards=True, **options).id

    with Farm(settings) as farm:
        first = submit(farm)
        assert submit(farm) == first
        assert len(farm.batches()) == 1
        with pytest.raises(KeyUsed, match="monday"):
            submit(farm, num_inference_steps=3)
        assert submit(farm, owner="somebody else") != first
        with pytest.raises(InvalidInput, match="key"):
            farm.submit("sea", key="")

"""Checkpoints and previews of a running render, while the object store hangs or the model is being loaded."""

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from farm.jobs.database import Database
from farm.jobs.records import Claim
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.settings import Settings
from tests.gated import SOON, Gated, request, running
from tests.integration.conftest import wait_until
from workers.service.observer import Observer

SETTINGS = Settings.load(
    database_url="sqlite://", broker_url="redis://", s3_bucket="farm", checkpoint_seconds=1e-9, home="nowhere"
)


class Hung(Storage):
    """An object store whose writes wait for the test."""

    def __init__(self) -> None:
        super().__init__(SETTINGS)
        self.begun, self.go = threading.Event(), threading.Event()
        self.written: list[str] = []

    def put(self, key: str, data: bytes, content_type: str = "") -> None:
        self.written.append(key)
        self.begun.set()
        assert self.go.wait(SOON)


def claimed(store: JobStore, steps: int) -> Claim:
    store.submissions.submit("b", "me", 50, [request("", steps=steps).spec])
    (bell,) = store.backlog.enqueue(10).queued
    claim = store.leases.claim(bell.job_id, "w1@host")
    assert claim is not None
    return claim


@pytest.fixture
def store(sqlite_url: str) -> Iterator[JobStore]:
    with closing(Database(sqlite_url)) as database:
        yield JobStore.over(database, SETTINGS)


def test_what_was_asked_for_while_its_model_was_loaded_is_written_all_the_same(store: JobStore) -> None:
    gated, storage = Gated(), Hung()
    storage.go.set()
    with running(gated) as engine:
        observer, claim = Observer(engine, storage, store.attempts, SETTINGS), claimed(store, 100)
        observer.open(claim)
        job_id = claim.job_id
        observer.observe({job_id: False})  # the render is not in the engine yet
        future = engine.submit(request(job_id, steps=100))
        gated.begun()
        observer.observe({job_id: False})
        gated.next()
        wait_until(lambda: len(storage.written) == 2, "a checkpoint and a preview")
        gated.allow()
        future.result(SOON)
    assert {key.split(".a1.")[1] for key in storage.written[:2]} == {"checkpoint.safetensors", "preview.png"}


def test_a_preview_that_breaks_is_tried_again_after_some_steps(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated, storage = Gated(), Hung()
    storage.go.set()
    with running(gated) as engine:
        observer, claim = Observer(engine, storage, store.attempts, SETTINGS), claimed(store, 100)
        observation = observer.open(claim)
        observation.checkpointed_at = float("inf")
        job_id, tries = claim.job_id, []
        picture = engine.preview

        def breaks_once(*args: Any, **kwargs: Any) -> Any:
            tries.append(args)
            if len(tries) == 1:
                raise RuntimeError("no room")
            return picture(*args, **kwargs)

        monkeypatch.setattr(engine, "preview", breaks_once)
        future = engine.submit(request(job_id, steps=100))
        gated.begun()
        observer.observe({job_id: False})
        gated.next()
        wait_until(lambda: len(tries) == 1, "it breaks")
        gated.allow()
        future.result(SOON)
        observer._pool.shutdown(wait=True)
    assert storage.written


def test_states_do_not_pile_up_while_the_object_store_hangs(store: JobStore) -> None:
    gated, storage = Gated(), Hung()
    with running(gated) as engine:
        observer, claim = Observer(engine, storage, store.attempts, SETTINGS), claimed(store, 100)
        observer.open(claim)
        future = engine.submit(request(claim.job_id, steps=100))
        gated.begun()
        for _ in range(10):
            observer.observe({})
            gated.next()
        assert storage.begun.wait(SOON)
        storage.go.set()
        observer._pool.shutdown(wait=True)
        gated.allow()
        future.result(SOON)
    assert len(storage.written) == 1


def test_a_checkpoint_is_due_some_seconds_after_the_last_one(store: JobStore) -> None:
    gated, storage, now = Gated(), Hung(), [0.0]
    storage.go.set()
    settings = SETTINGS.model_copy(update={"checkpoint_seconds": 30.0})
    with running(gated) as engine:
        observer, claim = Observer(engine, storage, store.attempts, settings, clock=lambda: now[0]), claimed(store, 100)
        observation = observer.open(claim)
        future = engine.submit(request(claim.job_id, steps=100))
        gated.begun()
        for now[0], written in ((29.0, 0), (30.0, 1), (59.0, 1), (60.0, 2)):
            observer.observe({})
            gated.next()
            wait_until(lambda: not observation.checkpointing, "no checkpoint is on its way")
            assert len(storage.written) == written
        observer.close(observation)
        now[0] = 600.0
        observer.observe({})
        gated.allow()
        future.result(SOON)
        observer._pool.shutdown(wait=True)
    assert len(storage.written) == 2


def test_a_closed_observation_is_not_written_though_its_snapshot_was_taken(store: JobStore) -> None:
    gated, storage = Gated(), Hung()
    with running(gated) as engine:
        observer, claim = Observer(engine, storage, store.attempts, SETTINGS), claimed(store, 100)
        observation = observer.open(claim)
        future = engine.submit(request(claim.job_id, steps=100))
        gated.begun()
        snapshot = engine.snapshot(claim.job_id)
        gated.allow()
        future.result(SOON)
    observer.close(observation)
    observer.checkpoint(observation, snapshot.result(SOON))
    assert storage.written == []


def test_an_older_attempt_of_a_job_closes_no_newer_one(store: JobStore) -> None:
    with running(Gated()) as engine:
        observer, claim = Observer(engine, Hung(), store.attempts, SETTINGS), claimed(store, 100)
        older, newer = observer.open(claim), observer.open(claim)
        observer.close(older)
        assert observer._open == {claim.job_id: newer}

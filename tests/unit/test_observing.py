"""What is kept of a render while the object store hangs: one state, however long that takes."""

import threading

from farm.db import Database
from farm.jobs import JobStore
from farm.settings import Settings
from farm.storage import Storage
from tests.gated import SOON, Gated, request, running
from workers.observing import Held, Observer

SETTINGS = Settings.load(
    database_url="sqlite://", broker_url="redis://", s3_bucket="farm", checkpoint_seconds=1e-9, home="nowhere"
)


class Hung(Storage):
    """An object store that takes what it is given when it is told to."""

    def __init__(self) -> None:
        super().__init__(SETTINGS)
        self.begun, self.go = threading.Event(), threading.Event()
        self.written: list[str] = []

    def put(self, key: str, data: bytes, content_type: str = "") -> None:
        self.written.append(key)
        self.begun.set()
        assert self.go.wait(SOON)


def test_states_do_not_pile_up_while_the_object_store_hangs(sqlite_url: str) -> None:
    gated, storage, database = Gated(), Hung(), Database(sqlite_url)
    with running(gated) as engine:
        store = JobStore(database, SETTINGS)
        observer = Observer(engine, storage, store, SETTINGS)
        store.submit("b", "me", 50, [request("", steps=100).spec])
        (bell,) = store.enqueue(10)
        claim = store.claim(bell.job_id, "w1@host")
        assert claim is not None
        held = Held(claim)
        future = engine.submit(request(claim.job_id, steps=100))
        gated.begun()
        for _ in range(10):
            observer.beat([held], {})
            gated.next()
        assert storage.begun.wait(SOON)
        storage.go.set()
        observer._pool.shutdown(wait=True)
        gated.allow()
        future.result(SOON)
    database.close()
    assert len(storage.written) == 1

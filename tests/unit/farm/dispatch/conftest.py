"""The parts of one dispatcher with real SQL, Redis and S3; tests set the clock, and begin and end outages."""

import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from farm.dispatch.dispatcher import Dispatcher
from farm.errors import StorageUnavailable
from farm.jobs import leadership as election
from farm.jobs.database import Database, now_plus
from farm.jobs.leadership import Leadership
from farm.jobs.records import Artifact, Claim, Picture, Role, WorkerInfo
from farm.jobs.schema import BatchRow, JobRow, LeaderRow
from farm.jobs.served_models import ServedModel
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.queue.broker import Broker
from farm.settings import Settings
from farm.specs.object_keys import image_key, trajectory_keys
from farm.specs.spec import RenderSpec

WEIGHTS = "e" * 64
WORKER = WorkerInfo("w1@host", "cpu", "float32", 8, "0", (ServedModel("tiny", loaded=True, sha256=WEIGHTS),))
LEASE_SECONDS = 10.0


class Clock:
    """A monotonic clock that tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        """Advance the clock."""
        self.now += seconds


class Turns(threading.Event):
    """A stop event for a loop: each pause of the loop runs the test's next step, and the loop ends after the last one.

    A pause advances the clock by its length, but takes no real time. Other threads that the loop starts block in their
    first pause until the end.
    """

    def __init__(self, clock: Clock, *steps: Callable[[], object]) -> None:
        super().__init__()
        self._clock, self._steps = clock, list(steps)
        self._loop = threading.current_thread()
        self.pauses: list[float] = []
        """The length of each pause of the loop, in seconds."""

    def wait(self, timeout: float | None = None) -> bool:
        """Run the next step."""
        if threading.current_thread() is not self._loop or timeout is None:
            return super().wait()
        self.pauses.append(timeout)
        self._clock.pass_by(timeout)
        if self.is_set():
            return True
        if not self._steps:
            self.set()
            return True
        self._steps.pop(0)()
        return self.is_set()


class FlakyBroker(Broker):
    """A broker on a real Redis, with simulated outages and a hook that runs just before it publishes."""

    away = False
    before_publishing: Callable[[], object] | None = None
    pings = 0

    @contextmanager
    def _reached(self) -> Iterator[None]:
        with super()._reached():
            if self.away:
                raise redis.ConnectionError("the test says so")
            yield

    def publish(self, doorbells: Any) -> None:
        """Run the hook, then publish."""
        if self.before_publishing is not None:
            self.before_publishing()
        super().publish(doorbells)

    def ping(self) -> None:
        """Count the pings."""
        self.pings += 1
        super().ping()


class FlakyStorage(Storage):
    """A storage on a real S3, with simulated outages and copies that can be delayed."""

    away = False
    copies_may_go_on: threading.Event | None = None
    fails: Exception | None = None
    """The exception that copying raises."""
    copied: Sequence[str] = ()
    """The sources of the copies begun so far."""

    @contextmanager
    def _reached(self, what: str = "") -> Iterator[None]:
        if self.away:
            raise StorageUnavailable("the test says so")
        with super()._reached(what):
            yield

    def copy(self, source: str, key: str, size: int | None = None) -> bool:
        """Copy once the test allows it."""
        self.copied = [*self.copied, source]
        if self.fails is not None:
            raise self.fails
        if self.copies_may_go_on is not None:
            self.copies_may_go_on.wait()
        return super().copy(source, key, size)


@dataclass
class Parts:
    """The services and settings of a dispatcher; the only place where these tests create them."""

    db: Database
    store: JobStore
    broker: FlakyBroker
    storage: FlakyStorage
    settings: Settings
    clock: Clock = field(default_factory=Clock)

    def dispatcher(self) -> Dispatcher:
        """Return a dispatcher that uses the test's clock."""
        return Dispatcher(self.store, self.broker, self.storage, self.settings, self.clock)

    # --- jobs ---------------------------------------------------------------------------------------------------

    def submit(self, count: int = 1, name: str = "batch", *, reuse: bool = True, **fields: Any) -> list[str]:
        """Submit jobs; returns their ids."""
        specs = [RenderSpec(**{"prompt": f"{name} {n}", "seed": n, **fields}) for n in range(count)]
        batch_id = self.store.submissions.submit(name, "me", 50, specs, reuse=reuse)
        return [f"{batch_id}-{n}" for n in range(1, count + 1)]

    def claim(self, job_id: str) -> Claim:
        """Have a worker claim a job, whether or not the dispatcher has queued it."""
        with self.db.write() as session:
            session.execute(sa.update(JobRow).where(JobRow.id == job_id).values(state=JobState.QUEUED.value))
        claim = self.store.leases.claim(job_id, WORKER.name)
        assert claim is not None
        return claim

    def succeed(self, job_id: str, data: bytes = b"a picture") -> Picture:
        """Have a worker store a picture, and the films of a job with a trajectory, and report success."""
        claim = self.claim(job_id)
        key = image_key(claim.batch_id, claim.index, claim.attempt, claim.spec.prompt)
        films = [
            Artifact(role, film, media_type)
            for role, film, media_type in zip(
                (Role.FILM_STRIP, Role.ANIMATION), trajectory_keys(key), ("image/png", "image/webp"), strict=True
            )
            if claim.spec.trajectory
        ]
        for one in (key, *(film.key for film in films)):
            self.storage.put(one, data)
        picture = Picture(key, "a" * 64, len(data), 64, 64, WEIGHTS, 1.0)
        assert self.store.attempts.succeed(claim, picture, films)
        return picture

    def states(self, job_ids: Sequence[str]) -> list[JobState]:
        """Return the states of the jobs."""
        return [self.store.queries.job(job_id).state for job_id in job_ids]

    def messages(self) -> set[str]:
        """Return the jobs whose messages are in Redis."""
        return self.broker.waiting("tiny")

    # --- time in SQL ----------------------------------------------------------------------------------------------

    def shift_lease(self, job_id: str, seconds: float) -> None:
        """Set the end of a running job's lease to that many seconds from now."""
        self._shift(JobRow.lease_until, JobRow.id == job_id, seconds)

    def shift_end(self, job_id: str, seconds: float) -> None:
        """Set the end of a job to that many seconds from now; use a negative number."""
        self._shift(JobRow.finished_at, JobRow.id == job_id, seconds)

    def shift_batch_end(self, batch_id: str, seconds: float) -> None:
        """Set the end of a batch to that many seconds from now; use a negative number."""
        self._shift(BatchRow.ended_at, BatchRow.id == batch_id, seconds)

    def give_leadership_to(self, holder: str, seconds: float = 60.0) -> None:
        """Make another process the leader for that many seconds from now."""
        with self.db.write() as session:
            session.execute(sa.delete(LeaderRow))
            session.add(LeaderRow(name="dispatcher", holder=holder, until=now_plus(sa.literal(seconds))))

    def end_leadership(self) -> None:
        """Let the lease of the leader expire."""
        self._shift(LeaderRow.until, LeaderRow.name == "dispatcher", -1.0)

    def leader(self) -> str | None:
        """Return the leader."""
        with self.db.read() as session:
            return session.scalar(sa.select(LeaderRow.holder))

    def _shift(self, column: Any, which: sa.ColumnElement[bool], seconds: float) -> None:
        with self.db.write() as session:
            values = {column.key: now_plus(sa.literal(seconds))}
            session.execute(sa.update(column.class_).where(which).values(**values))

    # --- outages ---------------------------------------------------------------------------------------------------

    @contextmanager
    def sql_is_away(self) -> Iterator[None]:
        """Make every transaction fail as it does if the database does not answer."""
        start, end = self.sql_outage()
        start()
        try:
            yield
        finally:
            end()

    def sql_outage(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """Return functions that begin and end an outage of the database."""

        def fail(_connection: sa.Connection) -> None:
            raise sa.exc.OperationalError("BEGIN", None, sqlite3.OperationalError("the test says so"))

        return (
            lambda: sa.event.listen(self.db.engine, "begin", fail),
            lambda: sa.event.remove(self.db.engine, "begin", fail),
        )


@pytest.fixture
def parts(
    sqlite_url: str, valkey: str, s3: Mapping[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Parts]:
    """The parts of an empty farm, on SQLite."""
    monkeypatch.setattr(election, "RENEW_SECONDS", 0.0)  # each pass asks for the lease of the leader
    with made_of(sqlite_url, valkey, s3) as parts:
        yield parts


@contextmanager
def made_of(database_url: str, broker_url: str, s3: Mapping[str, str | None]) -> Iterator[Parts]:
    """Create the parts of a farm on these services."""
    settings = Settings.load(
        database_url=database_url,
        broker_url=broker_url,
        window=4,
        lease_seconds=LEASE_SECONDS,
        beat_seconds=2.0,
        progress_seconds=None,
        **s3,
    )
    with (
        closing(Database(database_url)) as db,
        closing(FlakyBroker(settings)) as broker,
        closing(FlakyStorage(settings)) as storage,
    ):
        yield Parts(db, JobStore.over(db, settings), broker, storage, settings)


@pytest.fixture
def leadership(parts: Parts) -> Leadership:
    """The dispatcher's membership in the election."""
    return Leadership(parts.db, "dispatcher")

"""A worker with real SQL and a gated engine; tests control its clock, database and object store."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch
from sqlalchemy.orm import Session

from farm.errors import DatabaseUnavailable, NotFound, StorageUnavailable
from farm.jobs.database import Database, now_plus
from farm.jobs.records import WorkerInfo
from farm.jobs.schema import JobRow
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.settings import Settings
from farm.specs.spec import RenderSpec
from tests.gated import Gated, running
from workers.models.opener import Opener
from workers.models.served import Served
from workers.pipelines import load
from workers.service.metrics import WorkerMetrics
from workers.service.published_models import PublishedModels
from workers.service.worker import Worker

HERE, ELSEWHERE = "w1@host", "w2@host"


@dataclass
class Clock:
    """A monotonic clock that tests set."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


class MemoryStorage(Storage):
    """An object store in memory."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.objects: dict[str, bytes] = {}
        self.away = False

    def put(self, key: str, data: bytes, content_type: str = "") -> None:
        self._answer()
        self.objects[key] = data

    def get(self, key: str) -> bytes:
        self._answer()
        if key not in self.objects:
            raise NotFound(key)
        return self.objects[key]

    def delete(self, key: str) -> None:
        self.delete_many([key])

    def delete_many(self, keys: object) -> None:
        self._answer()
        for key in keys:  # type: ignore[attr-defined]
            self.objects.pop(key, None)

    def _answer(self) -> None:
        if self.away:
            raise StorageUnavailable("the object store is away")


class UnsteadyDatabase(Database):
    """A database that tests make unreachable or slow."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.away = False
        self.before_write: Callable[[], None] = lambda: None

    @contextmanager
    def read(self) -> Iterator[Session]:
        self._answer()
        with super().read() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        self._answer()
        self.before_write()
        with super().write() as session:
            yield session

    def _answer(self) -> None:
        if self.away:
            raise DatabaseUnavailable("the database is away")


@dataclass
class Jobs:
    """Changes of jobs by the dispatcher and by another worker."""

    store: JobStore
    database: Database
    batches: int = field(default=0)

    def queued(self, **spec: object) -> str:
        """Submit one job and queue it; returns its id."""
        self.batches += 1
        given = {"prompt": "x", "seed": 1, "num_inference_steps": 4, "model": "tiny", **spec}
        batch_id = self.store.submissions.submit(f"b{self.batches}", "me", 50, [RenderSpec(**given)])  # type: ignore[arg-type]
        self.store.backlog.enqueue(10)
        return f"{batch_id}-1"

    def age_lease(self, job_id: str, seconds: float) -> None:
        """Shorten the rest of a job's lease."""
        with self.database.write() as session:
            left = sa.func.julianday(JobRow.lease_until) - sa.func.julianday("now")
            session.execute(
                sa.update(JobRow)
                .where(JobRow.id == job_id)
                .values(lease_until=now_plus(left * 86400.0 - sa.literal(seconds)))
            )

    def lease_runs_out(self, job_id: str) -> None:
        """Expire a job's lease, as the dispatcher does."""
        self.age_lease(job_id, 3600)
        assert self.store.leases.expire() == 1

    def taken_by_another_worker(self, job_id: str) -> None:
        """Expire a job's lease, and have another worker claim the job."""
        self.lease_runs_out(job_id)
        assert [bell.job_id for bell in self.store.backlog.enqueue(10).queued] == [job_id]
        assert self.store.leases.claim(job_id, ELSEWHERE) is not None

    def state(self, job_id: str) -> JobState:
        return self.store.queries.job(job_id).state


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def settings(sqlite_url: str, tmp_path: Path) -> Settings:
    return Settings.load(
        database_url=sqlite_url,
        broker_url="redis://",
        s3_bucket="farm",
        home="nowhere",
        models="tiny=null:",
        retry_seconds=0,
        checkpoint_seconds=None,
        forward_sizes=tmp_path / "forwards.json",
    )


@pytest.fixture
def database(settings: Settings) -> Iterator[UnsteadyDatabase]:
    """The worker's connection to the database."""
    with closing(UnsteadyDatabase(settings.database_url)) as database:
        yield database


@pytest.fixture
def jobs(settings: Settings) -> Iterator[Jobs]:
    with closing(Database(settings.database_url)) as database:
        yield Jobs(JobStore.over(database, settings), database)


@pytest.fixture
def gated() -> Gated:
    return Gated()


@pytest.fixture
def worker(settings: Settings, database: UnsteadyDatabase, gated: Gated) -> Iterator[Worker]:
    """A worker whose threads do not run: tests call `leases.renew` themselves."""
    with running(gated) as engine:
        pins, device, draining = engine._pins, torch.device("cpu"), threading.Event()
        storage, store = MemoryStorage(settings), JobStore.over(database, settings)
        opener = Opener(settings, storage, load, device, torch.float32, draining)
        info = WorkerInfo(HERE, "cpu", "float32", engine.slots, "1")
        models = PublishedModels(store.workers, info, Served(pins, opener, device))
        metrics = WorkerMetrics(settings)
        metrics.start(models.info, device, engine, pins, {})
        store.workers.register(models.info)
        yield Worker(
            HERE,
            settings,
            db=database,
            storage=storage,
            pins=pins,
            engine=engine,
            models=models,
            metrics=metrics,
            draining=draining,
        )
        gated.allow()

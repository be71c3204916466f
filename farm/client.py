"""The Python client: `Farm` to hand prompts in, `Batch` and `Job` to watch and fetch what comes of them."""

import getpass
import hashlib
import html
import io
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image

from farm import progress as bars
from farm.broker import Broker
from farm.db import Database
from farm.dispatch import Dispatcher
from farm.errors import BrokerUnavailable, InvalidInput, JobNotSucceeded, Problem, StorageUnavailable
from farm.jobs import JobStore
from farm.records import BatchStatus, JobInfo, Picture, WorkerInfo
from farm.settings import Settings
from farm.sheet import contact_sheet
from farm.sources import Row, specs
from farm.spec import RenderSpec
from farm.states import JobState
from farm.storage import Storage

log = logging.getLogger(__name__)

_POLL_SECONDS = (0.1, 1.0)
"""How often a waiting client asks: at first, and in the end."""
_DOWNLOADS = 8
_SHEET_PICTURES = 200


class Farm:
    """A farm to hand prompts to.

    `Farm()` finds its settings by itself: `FARM_*` in the environment, or the embedded farm that `farm up` started in
    this folder. Use it as a context manager, or `close` it. Safe to use from many threads.

    Raises `NotConfigured` when there is no farm to be found, `DatabaseUnavailable` when its database does not
    answer, `SchemaMismatch` when that is of another version.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings.load()
        self._db = Database(self.settings.database_url)
        self._db.check_schema()
        self._store = JobStore(self._db, self.settings)
        self._storage = Storage(self.settings)
        self._broker = Broker(self.settings)

    def check(self) -> None:
        """Raise the `ServiceUnavailable` of the first service that does not answer."""
        self._broker.ping()
        self._storage.ping()

    def submit(
        self,
        what: str | RenderSpec | Iterable[str | RenderSpec | Mapping[str, Any] | Row],
        *,
        name: str | None = None,
        priority: int = 50,
        owner: str | None = None,
        **defaults: Any,
    ) -> "Batch":
        """Hand in prompts, specs, or mappings of a spec's fields; all of them are accepted, or none.

        Further keyword arguments are defaults for the fields that a prompt or mapping leaves out, such as
        `num_inference_steps=30, model="sd15"`; a whole `RenderSpec` stays as it is. `priority` is 0 to 100, the
        higher the sooner. When this returns, the jobs are safe in SQL, and the first of them in Redis, unless that
        is away: then they start when it is back, and a warning is logged.

        Raises `InvalidInput` with everything that is wrong, and `DatabaseUnavailable`.
        """
        rows = [what] if isinstance(what, str | RenderSpec) else what
        made = specs(rows, defaults)
        problems = []
        if not made:
            problems.append(Problem("", "", "there is nothing to render: no prompts"))
        if not 0 <= priority <= 100:
            problems.append(Problem("", "priority", f"should be 0 to 100, not {priority}"))
        name = (name or "").strip() or "batch"
        if len(name) > 200 or "\x00" in name:
            problems.append(Problem("", "name", "should be at most 200 characters, without NUL"))
        if problems:
            raise InvalidInput(problems)
        batch_id = self._store.submit(name, owner or self.settings.owner or getpass.getuser(), priority, made)
        try:
            Dispatcher(self._store, self._broker, self.settings).fill()
        except BrokerUnavailable as error:
            log.warning("the jobs are safe in SQL and start when Redis is back: %s", error)
        return Batch(self, self._store.batch(batch_id))

    def batch(self, name_or_id: str) -> "Batch":
        """A batch by its id, or the newest of that name; raises `NotFound`."""
        return Batch(self, self._store.batch(name_or_id))

    def batches(self, limit: int = 20) -> list[BatchStatus]:
        """How far the newest batches are, newest first."""
        return self._store.batches(limit)

    def job(self, job_id: str) -> "Job":
        """A job by its id; raises `NotFound`."""
        return Job(self, self._store.job(job_id))

    def workers(self) -> list[WorkerInfo]:
        """The workers, what they render on, and the models they hold."""
        return self._store.workers()

    def waiting(self) -> dict[str, int]:
        """How many jobs of each model wait for a worker."""
        return self._store.waiting_by_model()

    def close(self) -> None:
        """Close every connection."""
        self._broker.close()
        self._storage.close()
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Batch:
    """One bulk submission: a name, a priority, jobs in their order."""

    def __init__(self, farm: Farm, status: BatchStatus) -> None:
        self._farm = farm
        self._store = farm._store  # noqa: SLF001  (a handle of the farm's own)
        self.id = status.id
        self.name = status.name
        self.total = status.total

    def status(self) -> BatchStatus:
        """How far it is, now."""
        return self._store.batch(self.id)

    def jobs(self) -> Iterator["Job"]:
        """Its jobs as they are now, in their order."""
        after = 0
        while found := self._store.jobs(self.id, after=after):
            for info in found:
                yield Job(self._farm, info)
            after = found[-1].index

    __iter__ = jobs

    def __len__(self) -> int:
        return self.total

    def wait(self, timeout: float | None = None, *, progress: bool = False) -> BatchStatus:
        """Wait until every job has ended; with `progress`, behind a bar.

        Raises `TimeoutError` after `timeout` seconds; the batch goes on.
        """
        deadline = _deadline(timeout)
        with bars.bar(self.name, self.total, shown=progress) as shown:
            for pause in _pauses():
                status = self.status()
                steps = self._partly_done() if progress and status.counts[JobState.RUNNING] else 0.0
                shown.update(status.ended + steps, bars.note(status.counts))
                if status.done:
                    return status
                _sleep(pause, deadline, self.name)
        raise AssertionError("unreachable: the pauses never end")

    def _partly_done(self) -> float:
        running = self._store.running(self.id)
        return sum(min(1.0, info.steps_done / info.spec.num_inference_steps) for info in running)

    def as_completed(self, timeout: float | None = None) -> Iterator["Job"]:
        """Its jobs as they end, each once: succeeded, failed and cancelled ones.

        Raises `TimeoutError` after `timeout` seconds; the batch goes on.
        """
        deadline = _deadline(timeout)
        seen: set[str] = set()
        since = None
        for pause in _pauses():
            for info in self._store.finished(self.id, since):
                if info.id not in seen:
                    seen.add(info.id)
                    yield Job(self._farm, info)
                since = info.finished_at
            if len(seen) == self.total:
                return
            if self.status().done:
                # Another transaction's earlier time can become visible after a later one's: look at all once more.
                since = None
            _sleep(pause, deadline, self.name)

    def download(self, folder: str | os.PathLike[str], *, progress: bool = False) -> list[Path]:
        """Fetch the pictures of all jobs that succeeded so far into a folder, in order; returns their paths.

        A picture that is there already, with the right SHA-256, is not fetched again. Each is checked and then put
        in place whole. Raises `StorageUnavailable`.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        found = [job for job in self.jobs() if job.picture is not None]
        paths: list[Path] = []
        with (
            bars.bar(f"{self.name}: fetching", len(found), shown=progress) as shown,
            ThreadPoolExecutor(_DOWNLOADS) as pool,
        ):
            for path in pool.map(lambda job: job.download(target), found):
                paths.append(path)
                shown.update(len(paths))
        return paths

    def contact_sheet(self, columns: int | None = None) -> Image.Image:
        """All its pictures on one page, each with its prompt; a job without one leaves an empty frame.

        At most the first 200.
        """
        jobs = [job for _, job in zip(range(_SHEET_PICTURES), self.jobs(), strict=False)]
        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            images = pool.map(lambda job: job.image() if job.picture else None, jobs)
            return contact_sheet(list(zip(images, (job.spec.prompt for job in jobs), strict=True)), columns)

    def cancel(self) -> int:
        """Cancel what has not ended; returns how many jobs that were. A running one stops within a beat."""
        return self._store.cancel(batch_id=self.id)

    def __repr__(self) -> str:
        return f"<Batch {self.id}: {self.total} jobs>"

    def _repr_html_(self) -> str:
        status = self.status()
        cells = "".join(f"<td>{count} {state}</td>" for state, count in status.counts.items() if count)
        return f"<table><tr><th>{html.escape(self.name)}</th><td>{status.ended}/{self.total}</td>{cells}</tr></table>"


class Job:
    """One spec to be rendered into one image; in a notebook it shows its picture."""

    def __init__(self, farm: Farm, info: JobInfo) -> None:
        self._farm = farm
        self._info = info

    @property
    def id(self) -> str:
        """Its id, which Celery and Flower call the task's too."""
        return self._info.id

    @property
    def index(self) -> int:
        """Its place in its batch, from 1."""
        return self._info.index

    @property
    def spec(self) -> RenderSpec:
        """What is to be rendered."""
        return self._info.spec

    @property
    def state(self) -> JobState:
        """Where it was when last looked at; `refresh` looks again."""
        return self._info.state

    @property
    def error(self) -> str | None:
        """Why it failed, or why its last try did."""
        return self._info.error

    @property
    def info(self) -> JobInfo:
        """All that SQL said of it when last looked at."""
        return self._info

    @property
    def picture(self) -> Picture | None:
        """Key, SHA-256, size and model of its picture; None unless it succeeded."""
        return self._info.picture

    def refresh(self) -> Self:
        """Look at it again; returns itself."""
        self._info = self._farm._store.job(self.id)  # noqa: SLF001
        return self

    def wait(self, timeout: float | None = None) -> Self:
        """Wait until it has ended; returns itself. Raises `TimeoutError` after `timeout` seconds."""
        deadline = _deadline(timeout)
        for pause in _pauses():
            if self.refresh().state.terminal:
                break
            _sleep(pause, deadline, self.id)
        return self

    def png(self) -> bytes:
        """Its picture's bytes, checked against the SHA-256 in SQL.

        Raises `JobNotSucceeded`, or `StorageUnavailable` if what is stored is not what was rendered.
        """
        picture = self._succeeded()
        data = self._farm._storage.get(picture.key)  # noqa: SLF001
        if hashlib.sha256(data).hexdigest() != picture.sha256:
            raise StorageUnavailable(f"job {self.id}: {picture.key} is not what was rendered (its SHA-256 differs)")
        return data

    def image(self) -> Image.Image:
        """Its picture, waiting for it if need be; raises `JobNotSucceeded`."""
        image = Image.open(io.BytesIO(self.wait().png()))
        image.load()
        return image

    def url(self, seconds: int = 3600) -> str:
        """A presigned address of its picture that anybody can open for that long; raises `JobNotSucceeded`."""
        return self._farm._storage.url(self._succeeded().key, seconds)  # noqa: SLF001

    def download(self, folder: str | os.PathLike[str]) -> Path:
        """Fetch its picture into a folder, unless it is there already; returns its path."""
        picture = self._succeeded()
        path = Path(folder) / Path(picture.key).name
        if not (path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == picture.sha256):
            partial = path.with_name(path.name + ".part")
            partial.write_bytes(self.png())
            partial.replace(path)
        return path

    def cancel(self) -> bool:
        """Cancel it; False if it had ended. If it is running, it stops within a beat."""
        return bool(self._farm._store.cancel(job_id=self.id))  # noqa: SLF001

    def _succeeded(self) -> Picture:
        if self._info.picture is None and not self._info.state.terminal:
            self.refresh()
        if self._info.picture is None:
            why = f": {self._info.error}" if self._info.error else ""
            raise JobNotSucceeded(f"job {self.id} has no picture, it is {self.state}{why}")
        return self._info.picture

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.state}: {self.spec.prompt!r:.60}>"

    def _repr_png_(self) -> bytes | None:
        return self.png() if self.picture is not None else None


def _pauses() -> Iterator[float]:
    pause, most = _POLL_SECONDS
    while True:
        yield pause
        pause = min(pause * 1.2, most)


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _sleep(pause: float, deadline: float | None, what: str) -> None:
    left = pause if deadline is None else deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"{what} has not ended in time; it goes on")
    time.sleep(min(pause, left))

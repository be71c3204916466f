"""The handle of a batch: follow, download and steer it."""

import html
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from farm.client import pictures
from farm.client.archive import archive
from farm.client.job import Job
from farm.client.report import report
from farm.dispatch.deletion import Deletion
from farm.dispatch.manifests import Manifests
from farm.errors import StorageUnavailable
from farm.jobs.records import BatchStatus, JobInfo
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.runtime.parallel import parallel_map
from farm.runtime.polling import polls
from farm.settings import Settings
from farm.show.contact_sheet import contact_sheet
from farm.show.progress_bars import counts_text, progress_bar

log = logging.getLogger(__name__)

_SHEET_PICTURES = 200

T = TypeVar("T")


class Batch:
    """A submitted batch: a name, a priority, jobs in order."""

    def __init__(self, store: JobStore, storage: Storage, settings: Settings, status: BatchStatus) -> None:
        self._store = store
        self._storage = storage
        self._settings = settings
        self.id = status.id
        self.name = status.name
        self.total = status.total

    def status(self) -> BatchStatus:
        """Its current status."""
        return self._store.queries.batch(self.id)

    def jobs(self, *, after: int = 0, states: Sequence[JobState] = ()) -> Iterator[Job]:
        """Its jobs in order, optionally only jobs after an index or in some states.

        Reads a thousand jobs at a time.
        """
        return map(self._job, self._infos(after, states))

    def __iter__(self) -> Iterator[Job]:
        return self.jobs()

    def _infos(self, after: int = 0, states: Sequence[JobState] = ()) -> Iterator[JobInfo]:
        while found := self._store.queries.jobs(self.id, after=after, states=states):
            yield from found
            after = found[-1].index

    def _pictured(self) -> Iterator[JobInfo]:
        return (info for info in self._infos(states=[JobState.SUCCEEDED]) if info.picture is not None)

    def wrong(self, limit: int = 20) -> list[Job]:
        """Its first jobs with an error: failed jobs, and jobs whose last try failed."""
        return [self._job(info) for info in self._store.queries.wrong(self.id, limit)]

    def _job(self, info: JobInfo) -> Job:
        return Job(self._store, self._storage, self._settings, info)

    def __len__(self) -> int:
        return self.total

    def wait(self, timeout: float | None = None, *, progress: bool = False) -> BatchStatus:
        """Wait until every job has ended, with `progress` behind a progress bar.

        Raises `TimeoutError` after `timeout` seconds; the batch continues.
        """
        with progress_bar(self.name, self.total, shown=progress, with_tempo=True) as shown:
            for _ in self._polls(timeout):
                status = self.status()
                steps = self._partly_done() if progress and status.counts[JobState.RUNNING] else 0.0
                speed = self._store.overview.tempo(status) if progress else None
                shown.update(status.ended + steps, counts_text(status.counts), speed)
                if status.done:
                    return status
        raise AssertionError("unreachable: the polls never end")

    def _polls(self, timeout: float | None) -> Iterator[None]:
        return polls(timeout, f"{self.name} has not ended in time; it goes on")

    def _partly_done(self) -> float:
        running = self._store.queries.running(self.id)
        return sum(min(1.0, info.steps_done / info.spec.num_inference_steps) for info in running)

    def as_completed(self, timeout: float | None = None) -> Iterator[Job]:
        """Yield each job once as it ends, whether it succeeded, failed or was cancelled.

        Raises `TimeoutError` after `timeout` seconds; the batch continues.
        """
        seen, left = bytearray(self.total + 1), self.total
        last = None
        for _ in self._polls(timeout):
            while found := self._store.queries.finished(self.id, last):
                for info in found:
                    if not seen[info.index]:
                        seen[info.index] = True
                        left -= 1
                        yield self._job(info)
                last = found[-1]
            if not left:
                return
            if self.status().done:
                # A transaction with an earlier time can become visible after a later one: read all jobs once more.
                last = None

    def download(self, folder: str | os.PathLike[str], *, progress: bool = False) -> list[Path]:
        """Download the pictures of all jobs that have succeeded so far into a folder; returns their paths in order.

        Film strips and animations of jobs with a trajectory are downloaded too. A picture that exists with the right
        SHA-256 is not downloaded again. Each file is checked and written atomically.

        Raises `StorageUnavailable`.
        """
        return list(self.fetch(folder, progress=progress))

    def fetch(self, folder: str | os.PathLike[str], *, progress: bool = False) -> Iterator[Path]:
        """Like `download`, but yields each path as its picture arrives, in constant memory."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        found = self._pictured()
        paths = parallel_map(lambda job: pictures.download(self._storage, job, target), found)
        return self._shown(paths, progress=progress)

    def archive(self, path: str | os.PathLike[str], *, progress: bool = False) -> int:
        """Write a ZIP file of the manifest and the pictures of all jobs that have succeeded so far; returns how many.

        Includes film strips and animations. Each picture is checked, and the file is written atomically.

        Raises `StorageUnavailable`.
        """
        found = self._pictured()
        packed = archive(self._storage, found, self.manifest(), Path(path))
        return sum(1 for _ in self._shown(packed, progress=progress))

    def _shown(self, found: Iterator[T], *, progress: bool) -> Iterator[T]:
        total = self.status().counts[JobState.SUCCEEDED]
        with progress_bar(f"{self.name}: fetching", total, shown=progress) as shown:
            for count, one in enumerate(found, 1):
                shown.update(count)
                yield one

    def manifest(self) -> Iterator[dict[str, Any]]:
        """The result of each job, in order: state, spec, key, SHA-256, worker, error, and so on.

        Read from `{batch}/manifest.jsonl` in the bucket if the batch has ended, else from SQL.
        """
        return Manifests(self._store.endings, self._storage).read(self.id)

    def contact_sheet(self, columns: int | None = None) -> Image.Image:
        """All its pictures on one page, each with its prompt; a job without a picture leaves an empty frame.

        At most the first 200.
        """
        jobs = list(islice(self.jobs(), _SHEET_PICTURES))
        images = parallel_map(lambda job: job.image() if job.picture else None, jobs)
        return contact_sheet(list(zip(images, (job.spec.prompt for job in jobs), strict=True)), columns)

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        full: bool = False,
        limit: int = 1000,
        after: int = 0,
        progress: bool = False,
    ) -> int:
        """Write the batch as one self-contained HTML file; returns the number of pictures in it.

        Contains pictures, specs, times and failures; at most `limit` pictures, of the jobs after the index `after`.
        They are small WebP images, or with `full` the PNG files. The file is written atomically.

        Raises `StorageUnavailable`.
        """
        found = islice(self._infos(after, [JobState.SUCCEEDED]), limit)
        wrong = islice(self._infos(states=[JobState.FAILED, JobState.CANCELLED]), limit)
        written = report(
            self._storage,
            self.status(),
            self._store.overview.totals(self.id),
            found,
            wrong,
            Path(path),
            full=full,
            after=after,
        )
        return sum(1 for _ in self._shown(written, progress=progress))

    def cancel(self) -> int:
        """Cancel all jobs that have not ended; returns how many. Running jobs stop within a beat."""
        return self._store.steering.cancel(batch_id=self.id)

    def pause(self) -> int:
        """Pause it until `resume`; returns how many jobs have not ended.

        Running jobs stop within a beat and resume later from their step.
        """
        return self._store.steering.pause(batch_id=self.id)

    def resume(self) -> int:
        """Resume it; returns how many jobs have not ended."""
        return self._store.steering.resume(batch_id=self.id)

    def retry(self) -> int:
        """Retry its failed jobs with all tries; returns how many."""
        return self._store.steering.retry(batch_id=self.id)

    def delete(self, *, cancel: bool = False) -> bool:
        """Delete it: it disappears at once and its key becomes free; then its objects and its rows are deleted.

        Returns whether everything is deleted. If jobs still run, the object store does not answer, or the call is
        interrupted, the dispatcher deletes the rest later. Raises `NotEnded` if jobs have not ended, unless `cancel` is
        set.
        """
        self._store.deletions.mark(self.id, cancel=cancel)
        try:
            return Deletion(self._store.deletions, self._storage).delete(self.id)
        except StorageUnavailable as error:
            log.warning("%s is deleted when its objects can be: %s", self.id, error)
            return False

    def __repr__(self) -> str:
        return f"<Batch {self.id}: {self.total} jobs>"

    def _repr_html_(self) -> str:
        status = self.status()
        cells = "".join(f"<td>{count} {state}</td>" for state, count in status.counts.items() if count)
        return f"<table><tr><th>{html.escape(self.name)}</th><td>{status.ended}/{self.total}</td>{cells}</tr></table>"

"""`Job`: a submitted job."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from PIL import Image

from farm.client import pictures
from farm.client.previews import Preview, watch
from farm.errors import NotFound
from farm.jobs.records import AttemptInfo, JobInfo, Picture, Role
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.runtime.polling import polls
from farm.settings import Settings
from farm.specs.spec import RenderSpec


class Job:
    """A submitted job, which renders one spec into one image; a notebook displays its picture."""

    def __init__(self, store: JobStore, storage: Storage, settings: Settings, info: JobInfo) -> None:
        self._store = store
        self._storage = storage
        self._settings = settings
        self._info = info

    @property
    def id(self) -> str:
        """Its id, which is also the task id in Celery and Flower."""
        return self._info.id

    @property
    def index(self) -> int:
        """Its index in its batch, from 1."""
        return self._info.index

    @property
    def spec(self) -> RenderSpec:
        """Its spec."""
        return self._info.spec

    @property
    def state(self) -> JobState:
        """Its state when last read; `refresh` reads it again."""
        return self._info.state

    @property
    def error(self) -> str | None:
        """The error of the job or of its last try."""
        return self._info.error

    @property
    def eta_seconds(self) -> float | None:
        """The time that its remaining steps take, when last read; None if unknown or if it is not running."""
        return self._info.eta_seconds

    @property
    def info(self) -> JobInfo:
        """Its record in SQL when last read."""
        return self._info

    @property
    def picture(self) -> Picture | None:
        """Key, SHA-256, size and model of its picture; None unless it succeeded."""
        return self._info.picture

    def refresh(self) -> Self:
        """Read it again from SQL; returns itself."""
        self._info = self._store.queries.job(self.id)
        return self

    def wait(self, timeout: float | None = None) -> Self:
        """Wait until it has ended; returns itself. Raises `TimeoutError` after `timeout` seconds."""
        for _ in polls(timeout, f"{self.id} has not ended in time; it goes on"):
            if self.refresh().state.terminal:
                break
        return self

    def png(self) -> bytes:
        """Its picture's bytes, checked against the SHA-256 in SQL.

        Raises `JobNotSucceeded`, or `StorageUnavailable` if the hash differs.
        """
        return pictures.fetch_png(self._storage, self._looked_at())

    def image(self) -> Image.Image:
        """Wait for its picture and return it; raises `JobNotSucceeded`."""
        return pictures.decode(self.wait().png())

    def trajectory(self) -> list[Image.Image]:
        """Wait for the job and return its picture after each step, in order, as RGB images.

        Raises `NotFound` if its spec has no `trajectory`, and `JobNotSucceeded`.
        """
        return pictures.frames(self._film(Role.ANIMATION), self.spec.num_inference_steps)

    def film_strip(self) -> Image.Image:
        """Wait for the job and return its steps on one page; raises the errors of `trajectory`."""
        return pictures.decode(self._film(Role.FILM_STRIP))

    def _film(self, role: Role) -> bytes:
        if not self.spec.trajectory:
            raise NotFound(f"job {self.id} kept no trajectory: its spec did not ask for one (trajectory=True)")
        info = self.wait().info
        return pictures.fetch_artifact(self._storage, info, pictures.find_artifact(info, role))

    def previews(self, *, vae: bool = False, timeout: float | None = None) -> Iterator[Preview]:
        """Each new preview until the job ends, small, or with `vae` at full size.

        The worker makes previews while a client asks. Raises `TimeoutError` after `timeout` seconds; the job continues.
        """
        return watch(
            self._store,
            self._storage,
            self.id,
            vae=vae,
            timeout=timeout,
            recent_steps=self._settings.preview_steps,
        )

    def preview(self, *, vae: bool = False, timeout: float | None = 60) -> Preview:
        """A current preview, or the picture if the job ends meanwhile.

        Raises `TimeoutError` after `timeout` seconds, and `JobNotSucceeded` if it ended without a picture.
        """
        shown = next(self.previews(vae=vae, timeout=timeout), None)
        steps = self.spec.num_inference_steps
        return shown or Preview(self.image(), steps, steps)

    def url(self, seconds: int = 3600) -> str:
        """A presigned URL of its picture, valid for `seconds`; raises `JobNotSucceeded`."""
        return self._storage.url(pictures.picture_of(self._looked_at()).key, seconds)

    def download(self, folder: str | os.PathLike[str]) -> Path:
        """Download its picture, and its trajectory if it has one, into a folder; returns the picture's path."""
        return pictures.download(self._storage, self._looked_at(), Path(folder))

    def cancel(self) -> bool:
        """Cancel it; False if it had ended. If it is running, it stops within a beat."""
        return bool(self._store.steering.cancel(job_id=self.id))

    def pause(self) -> bool:
        """Pause it until `resume`; False if it had ended. If it is running, it stops within a beat."""
        return bool(self._store.steering.pause(job_id=self.id))

    def resume(self) -> bool:
        """Resume it from its step; False if it had ended."""
        return bool(self._store.steering.resume(job_id=self.id))

    def retry(self) -> bool:
        """Retry it with all tries; False unless it had failed."""
        return bool(self._store.steering.retry(job_id=self.id))

    def attempts(self) -> list[AttemptInfo]:
        """Its attempts that have ended: worker, times, outcome, reason."""
        return self._store.queries.attempts(self.id)

    def _looked_at(self) -> JobInfo:
        """Its record, read again unless it had ended."""
        return self._info if self.state.terminal else self.refresh().info

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.state}: {self.spec.prompt!r:.60}>"

    def _repr_png_(self) -> bytes | None:
        return self.png() if self.picture is not None else None

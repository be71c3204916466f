"""Previews of running renders, which workers upload while a client asks."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from farm.client.pictures import decode
from farm.errors import NotFound
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.runtime.polling import polls
from farm.specs.object_keys import preview_key

_WANTED_SECONDS, _RENEW_SECONDS = 30.0, 10.0
"""How long a request for previews lasts, and how often it is renewed."""


@dataclass(frozen=True)
class Preview:
    """A picture of a job after some of its steps."""

    image: Image.Image
    """The VAE's decoding of the latents, shrunk or at full size."""
    step: int
    """The number of steps done."""
    steps: int
    """The number of steps in all."""


def watch(
    store: JobStore, storage: Storage, job_id: str, *, vae: bool, timeout: float | None, recent_steps: int
) -> Iterator[Preview]:
    """Each new preview of a job until it ends; waits for the job to start.

    The first may come from an earlier request, if it is less than `recent_steps` behind.
    Raises `TimeoutError` after `timeout` seconds, and `NotFound` if the job does not exist.
    """
    asked: float | None = None
    etag = None
    for _ in polls(timeout, f"{job_id} has shown nothing new in time; it goes on"):
        if asked is None or time.monotonic() - asked >= _RENEW_SECONDS:
            asked = time.monotonic()
            store.steering.request_preview(job_id, vae=vae, seconds=_WANTED_SECONDS)
        job = store.queries.job(job_id)
        if job.state.terminal:
            return
        if job.state is not JobState.RUNNING:
            continue
        try:
            found = storage.get_if_changed(preview_key(job.batch_id, job.index, job.attempt), etag)
        except NotFound:
            continue
        if found is not None:
            data, etag = found
            image = decode(data)
            preview = Preview(image, int(image.info["step"]), int(image.info["steps"]))
            if preview.step > job.steps_done - recent_steps:
                yield preview

"""The one task: claim, render, upload, finish."""

import hashlib
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from celery import Celery
from celery.exceptions import Ignore

from farm.broker import RENDER_TASK
from farm.errors import (
    DatabaseUnavailable,
    FarmError,
    RenderCancelled,
    RenderHandedBack,
    ServiceUnavailable,
)
from farm.records import Picture
from farm.storage import image_key
from workers import png
from workers.lifecycle import Held, Worker
from workers.request import Rendered, RenderRequest

log = logging.getLogger(__name__)

T = TypeVar("T")

OUTAGE_SECONDS = 600
"""How long a finished picture waits for SQL or S3 to come back before its job is given up."""


def register(app: Celery, worker: Worker) -> None:
    """Make the render task known to this worker's app."""

    @app.task(name=RENDER_TASK, throws=(FarmError,))
    def render(job_id: str) -> str:
        return render_job(worker, job_id)


def render_job(worker: Worker, job_id: str) -> str:
    """Render one job from claim to finish; returns what Flower shows as its result.

    Raises `Ignore` when there is nothing to do, and the `FarmError` that failed the job, after it is recorded.
    """
    if worker.draining.is_set():
        worker.store.unqueue([job_id])
        raise Ignore
    try:
        held = worker.claim(job_id)
    except DatabaseUnavailable as error:
        # The message is gone, the job is still queued: the dispatcher finds that and brings it back.
        log.error("can't claim job_id=%s: %s", job_id, error)
        raise Ignore from error
    if held is None:
        log.info("nothing to claim job_id=%s", job_id)
        raise Ignore
    try:
        return _render(worker, held)
    finally:
        worker.release(held)


def _render(worker: Worker, held: Held) -> str:
    claim, store = held.claim, worker.store
    try:
        rendered = worker.engine.submit(RenderRequest(claim.job_id, claim.spec)).result()
        return _deliver(worker, held, rendered)
    except RenderCancelled:
        if held.cancelled.is_set():
            _insist(lambda: store.stopped(claim))
            return "cancelled"
        return "lease lost: rendered elsewhere"
    except RenderHandedBack:
        _insist(lambda: store.hand_back(claim))
        return "handed back: the worker stops"
    except FarmError as error:
        reason, retryable = str(error), error.retryable
        log.warning("render failed job_id=%s attempt=%d: %s", claim.job_id, claim.attempt, error)
        _insist(lambda: store.fail(claim, reason, retryable=retryable))
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        log.exception("render broke job_id=%s attempt=%d", claim.job_id, claim.attempt)
        _insist(lambda: store.fail(claim, reason, retryable=True))
        raise


def _deliver(worker: Worker, held: Held, rendered: Rendered) -> str:
    claim = held.claim
    data = png.encode(
        claim.spec,
        rendered,
        {
            "job": claim.job_id,
            "batch": claim.batch_name,
            "index": claim.index,
            "attempt": claim.attempt,
            "worker": worker.name,
        },
    )
    key = image_key(claim.batch_id, claim.index, claim.attempt, claim.spec.prompt)
    picture = Picture(
        key=key,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        width=rendered.width,
        height=rendered.height,
        model_sha256=rendered.model_sha256,
        render_seconds=rendered.render_seconds,
        warnings=rendered.warnings,
    )
    _insist(lambda: worker.storage.put(key, data, "image/png"))
    if not _insist(lambda: worker.store.succeed(claim, picture)):
        # Somebody else renders this job now, under another attempt and so another key.
        _insist(lambda: worker.storage.delete(key))
        return "too late: rendered elsewhere"
    return f"s3://{worker.storage.bucket}/{key}"


def _insist(call: Callable[[], T]) -> T:
    """Call again while a service is away, for `OUTAGE_SECONDS`: what is rendered is not thrown away lightly."""
    deadline = time.monotonic() + OUTAGE_SECONDS
    pause = 0.5
    while True:
        try:
            return call()
        except ServiceUnavailable as error:
            if time.monotonic() > deadline:
                raise
            log.warning("%s; trying again in %.1f s", error, pause)
            time.sleep(pause)
            pause = min(pause * 2, 5.0)

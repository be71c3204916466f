"""The one task: claim, render, upload, finish."""

import hashlib
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from celery import Celery
from celery.exceptions import Ignore, Retry

from farm.errors import (
    DatabaseUnavailable,
    ErrorClass,
    FarmError,
    ModelUnavailable,
    RenderCancelled,
    RenderHandedBack,
    ServiceUnavailable,
)
from farm.jobs.records import Claim, Picture
from farm.jobs.states import Outcome
from farm.queue.broker import RENDER_TASK
from farm.specs.object_keys import image_key, trajectory_keys
from workers.outputs import checkpoint, film, png
from workers.render.request import HandedBack, Rendered, RenderRequest, Snapshot
from workers.service.observer import Held
from workers.service.worker import Worker

log = logging.getLogger(__name__)

T = TypeVar("T")

OUTAGE_SECONDS = 600
"""How long a finished picture waits for SQL or S3 to come back before its job is given up."""
CLAIM_SECONDS = 60
"""How long a message waits for SQL to come back before it is dropped; the dispatcher sends another one then."""


def register(app: Celery, worker: Worker) -> None:
    """Make the render task known to this worker's app."""

    @app.task(name=RENDER_TASK, throws=(FarmError,))
    def render(job_id: str) -> str:
        return render_job(worker, job_id)


def render_job(worker: Worker, job_id: str) -> str:
    """Render one job from claim to finish; returns what Flower shows as its result.

    Raises `Ignore` when there is nothing to do, `Retry` for a job that goes on later under its next message, and the
    `FarmError` that failed the job, after it is recorded.
    """
    try:
        held = _insist(lambda: _claim(worker, job_id), seconds=CLAIM_SECONDS)
    except DatabaseUnavailable as error:
        # The message is gone, the job is still queued: the dispatcher finds that and brings it back.
        log.error("can't claim job_id=%s: %s", job_id, error)
        raise Ignore from error
    if held is None:
        log.info("nothing to claim job_id=%s", job_id)
        raise Ignore
    try:
        result = _render(worker, held)
    finally:
        worker.release(held)
    if result is None:
        raise Ignore  # whoever has the job now tells Flower how it ends
    return result


def _claim(worker: Worker, job_id: str) -> Held | None:
    if worker.draining.is_set() or worker.engine.failed is not None:
        worker.store.backlog.unqueue([job_id])
        return None
    return worker.claim(job_id)


def _render(worker: Worker, held: Held) -> str | None:
    claim, store = held.claim, worker.store
    try:
        if not worker.has_room(claim.spec):  # to try would end the worker on the CPU, and all that it renders
            raise _handed_back(worker, held, "no memory for it here", elsewhere=True)
        request = RenderRequest(
            claim.job_id, claim.spec, claim.priority, attempt=claim.attempt, resume=_resumed(worker, claim)
        )
        future = worker.engine.submit(request)
        worker.observer.begin(held)
        return _deliver(worker, held, future.result())
    except RenderCancelled:
        if held.cancelled.is_set():
            _forget(worker, held)
            held.outcome = Outcome.CANCELLED if _insist(lambda: store.attempts.stopped(claim)) else Outcome.LOST
            return "cancelled"
        _leave(worker, held)
        held.outcome = Outcome.LOST
        log.info("lease lost, rendered elsewhere job_id=%s attempt=%d", claim.job_id, claim.attempt)
        return None
    except RenderHandedBack as error:
        snapshot = error.snapshot if isinstance(error, HandedBack) else None
        if snapshot is not None and not claim.spec.trajectory:
            worker.observer.checkpoint(held, snapshot)
        worker.observer.end(held)
        raise _handed_back(worker, held) from error
    except FarmError as error:
        if isinstance(error, ModelUnavailable) and worker.draining.is_set():
            raise _handed_back(worker, held) from error  # its model was still on its way here
        reason, error_class = str(error), error.error_class
        log.warning("render failed job_id=%s attempt=%d: %s", claim.job_id, claim.attempt, error)
        _forget(worker, held)
        if error_class is ErrorClass.OUT_OF_MEMORY:
            _insist(lambda: worker.no_room(claim.spec))
        _fail(worker, held, reason, error_class)
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        log.exception("render broke job_id=%s attempt=%d", claim.job_id, claim.attempt)
        _forget(worker, held)
        _fail(worker, held, reason, ErrorClass.TRANSIENT)
        raise


def _handed_back(worker: Worker, held: Held, why: str = "its worker stops", *, elsewhere: bool = False) -> Retry:
    """Give a job back to the backlog, at no cost to it; what its task ends with."""
    why = "paused" if held.paused.is_set() else why
    store, seconds = worker.store, worker.settings.drain_seconds / 4
    # If SQL is away now, the lease runs out and does the same.
    back = _insist(lambda: store.attempts.hand_back(held.claim, why, elsewhere=elsewhere), seconds=seconds)
    held.outcome = Outcome.HANDED_BACK if back else Outcome.LOST
    return Retry(f"handed back: {why}", exc=RenderHandedBack(why))


def _fail(worker: Worker, held: Held, reason: str, error_class: ErrorClass) -> None:
    store, claim = worker.store, held.claim
    recorded = _insist(lambda: store.attempts.fail(claim, reason, error_class))
    again = store.attempts.tries_again(claim, error_class)
    held.outcome = (Outcome.RETRIED if again else Outcome.FAILED) if recorded else Outcome.LOST
    held.error_class = error_class


def _resumed(worker: Worker, claim: Claim) -> Snapshot | None:
    """Where an earlier attempt stopped; None if none left its state, or that can't be used."""
    key = claim.checkpoint_key
    if key is None or claim.spec.trajectory:
        return None
    try:
        snapshot = checkpoint.unpack(worker.storage.get(key))
    except (FarmError, ValueError) as error:
        log.warning("job_id=%s starts afresh: %s can't be read: %s", claim.job_id, key, error)
        return None
    log.info("resuming job_id=%s attempt=%d at step=%d", claim.job_id, claim.attempt, snapshot.steps_done)
    return snapshot


def _deliver(worker: Worker, held: Held, rendered: Rendered) -> str | None:
    claim, storage = held.claim, worker.storage
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
        device_seconds=rendered.device_seconds,
    )
    objects = [(key, data, "image/png")]
    if rendered.frames:
        strip_key, animation_key = trajectory_keys(key)
        objects += [
            (strip_key, film.strip(rendered.frames), "image/png"),
            (animation_key, film.animation(rendered.frames), "image/webp"),
        ]
    for name, content, content_type in objects:
        _insist(lambda: storage.put(name, content, content_type))  # noqa: B023 - called here and now
    worker.observer.end(held)  # before anybody may look for what is left: nothing comes after
    succeeded = _insist(lambda: worker.succeed(held, picture))
    if not succeeded:
        # Somebody else renders this job now, under another attempt and so other keys.
        _leave(worker, held)
        _insist(lambda: storage.delete_many([name for name, _, _ in objects]))
        return None
    _forget(worker, held)
    return f"s3://{storage.bucket}/{key}"


def _forget(worker: Worker, held: Held) -> None:
    """Delete what was written of a job while it ran."""
    try:
        worker.observer.forget(held)
    except FarmError as error:
        log.warning("left behind for job_id=%s: %s (%s)", held.claim.job_id, ", ".join(sorted(held.objects)), error)
        _leave(worker, held)


def _leave(worker: Worker, held: Held) -> None:
    """Write nothing more of a job, and have the dispatcher look for what was written once it has ended.

    Whoever has it now may have ended it, and the dispatcher looked, while something of this attempt was on its way.
    """
    worker.observer.end(held)
    if held.objects:
        _insist(lambda: worker.store.attempts.report_leftovers(held.claim))


def _insist(call: Callable[[], T], seconds: float = OUTAGE_SECONDS) -> T:
    """Call again while a service is away, for so long: what is rendered is not thrown away lightly."""
    deadline = time.monotonic() + seconds
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

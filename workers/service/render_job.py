"""One job from its claim to its end: rendered by the engine, uploaded, recorded."""

import logging
from dataclasses import dataclass

from farm.errors import (
    DatabaseUnavailable,
    ErrorClass,
    FarmError,
    ModelUnavailable,
    RenderCancelled,
    RenderHandedBack,
    ServiceUnavailable,
)
from farm.jobs.records import Claim
from farm.jobs.states import Outcome
from farm.runtime.retrying import insist
from workers.outputs import checkpoint
from workers.render.request import Rendered, RenderRequest, RequestHandedBack, Snapshot
from workers.service.delivery import delivery
from workers.service.leases import Lease
from workers.service.observer import Observation
from workers.service.outcomes import (
    Cancelled,
    Ended,
    Failed,
    HandedBack,
    LostLease,
    NothingToClaim,
    RenderOutcome,
    Succeeded,
)
from workers.service.worker import Worker

log = logging.getLogger(__name__)

OUTAGE_SECONDS = 600
"""How long a finished picture waits for SQL or S3 to come back before its job is given up."""
CLAIM_SECONDS = 60
"""How long a message waits for SQL to come back before it is dropped; the dispatcher sends another one then."""


def render_job(worker: Worker, job_id: str) -> RenderOutcome:
    """Claim a job and render it to its end. Blocks; called by one thread a job."""
    try:
        lease = insist(lambda: _claim(worker, job_id), CLAIM_SECONDS)
    except DatabaseUnavailable as error:
        # The message is gone, and the job still queued: the dispatcher finds it and sends another message.
        log.error("can't claim job_id=%s: %s", job_id, error)
        return NothingToClaim()
    if lease is None:
        log.info("nothing to claim job_id=%s", job_id)
        return NothingToClaim()
    claim = lease.claim
    worker.metrics.claimed(claim)
    ended: Ended = LostLease()
    try:
        ended = _Attempt(worker, lease, worker.observer.open(claim)).run()
    finally:
        worker.metrics.ended(claim, ended.recorded, ended.error_class if isinstance(ended, Failed) else None)
        worker.leases.release(lease)
    return ended


def _claim(worker: Worker, job_id: str) -> Lease | None:
    if worker.draining.is_set() or worker.engine.failed is not None:
        worker.store.backlog.unqueue([job_id])
        return None
    return worker.leases.claim(job_id)


@dataclass(frozen=True)
class _Attempt:
    """The claimed attempt of a job."""

    worker: Worker
    lease: Lease
    observation: Observation

    @property
    def claim(self) -> Claim:
        return self.lease.claim

    def run(self) -> Ended:
        """Render, deliver and record; every error ends in an outcome."""
        try:
            return self._end()
        except ServiceUnavailable as error:
            log.error("can't record how job_id=%s attempt=%d ended: %s", self.claim.job_id, self.claim.attempt, error)
            return Failed(error, Outcome.LOST, None)
        finally:
            self.worker.observer.close(self.observation)

    def _end(self) -> Ended:
        claim = self.claim
        try:
            if not self.worker.models.allows(claim.spec):
                # To try would end the worker on the CPU, and everything that it renders.
                return self._hand_back("no memory for it here", elsewhere=True)
            return self._deliver(self._render())
        except RenderCancelled:
            return self._cancel() if self.lease.cancelled else self._lose()
        except RenderHandedBack as error:
            snapshot = error.snapshot if isinstance(error, RequestHandedBack) else None
            if snapshot is not None and not claim.spec.trajectory:
                self.worker.observer.checkpoint(self.observation, snapshot)
            self.worker.observer.close(self.observation)
            return self._hand_back()
        except FarmError as error:
            if isinstance(error, ModelUnavailable) and self.worker.draining.is_set():
                return self._hand_back()  # the drain stopped the download of its model
            log.warning("render failed job_id=%s attempt=%d: %s", claim.job_id, claim.attempt, error)
            return self._fail(error, str(error), error.error_class)
        except Exception as error:
            log.exception("render broke job_id=%s attempt=%d", claim.job_id, claim.attempt)
            return self._fail(error, f"{type(error).__name__}: {error}", ErrorClass.TRANSIENT)

    def _render(self) -> Rendered:
        claim = self.claim
        request = RenderRequest(
            claim.job_id, claim.spec, claim.priority, attempt=claim.attempt, resume=_last_checkpoint(self.worker, claim)
        )
        future = self.worker.engine.submit(request)
        self.worker.observer.begin(self.observation)
        return future.result()

    def _deliver(self, rendered: Rendered) -> Ended:
        worker, claim = self.worker, self.claim
        made = delivery(claim, rendered, worker.name)
        for each in made.objects:
            insist(lambda: worker.storage.put(each.key, each.data, each.media_type), OUTAGE_SECONDS)  # noqa: B023 - called here and now
        # Before the success is recorded: from then on the sweep may look for leftovers, and nothing may follow.
        worker.observer.close(self.observation)
        if not insist(lambda: worker.record_success(made.success), OUTAGE_SECONDS):
            # Another worker renders this job, under a later attempt and so under other keys.
            self._leave_to_sweep()
            insist(lambda: worker.storage.delete_many([each.key for each in made.objects]), OUTAGE_SECONDS)
            return LostLease()
        picture = made.success.picture
        worker.metrics.rendered(claim, picture)
        self._delete_leftovers()
        return Succeeded(f"s3://{worker.storage.bucket}/{picture.key}")

    def _cancel(self) -> Ended:
        self._delete_leftovers()
        recorded = insist(lambda: self.worker.store.attempts.stopped(self.claim), OUTAGE_SECONDS)
        return Cancelled(Outcome.CANCELLED if recorded else Outcome.LOST)

    def _lose(self) -> Ended:
        self._leave_to_sweep()
        log.info("lease lost, rendered elsewhere job_id=%s attempt=%d", self.claim.job_id, self.claim.attempt)
        return LostLease()

    def _hand_back(self, why: str = "its worker stops", *, elsewhere: bool = False) -> Ended:
        why = "paused" if self.lease.paused else why
        attempts, seconds = self.worker.store.attempts, self.worker.settings.drain_seconds / 4
        # If SQL stays away, the lease runs out, which does the same.
        recorded = insist(lambda: attempts.hand_back(self.claim, why, elsewhere=elsewhere), seconds)
        return HandedBack(why, Outcome.HANDED_BACK if recorded else Outcome.LOST)

    def _fail(self, error: Exception, reason: str, error_class: ErrorClass) -> Ended:
        attempts, claim = self.worker.store.attempts, self.claim
        self._delete_leftovers()
        if error_class is ErrorClass.OUT_OF_MEMORY:
            insist(lambda: self.worker.models.forbid(claim.spec), OUTAGE_SECONDS)
        recorded = insist(lambda: attempts.fail(claim, reason, error_class), OUTAGE_SECONDS)
        ended = Outcome.RETRIED if attempts.tries_again(claim, error_class) else Outcome.FAILED
        return Failed(error, ended if recorded else Outcome.LOST, error_class)

    def _delete_leftovers(self) -> None:
        """Delete what was written of the job beside its picture; what can't be deleted is left to the sweep."""
        try:
            self.worker.observer.delete_leftovers(self.observation)
        except FarmError as error:
            log.warning("left behind for job_id=%s: %s", self.claim.job_id, error)
            self._leave_to_sweep()

    def _leave_to_sweep(self) -> None:
        """Write nothing more of the job, and have the dispatcher delete what was written once it has ended.

        Its next attempt may have ended and been swept while something of this one was on its way.
        """
        insist(lambda: self.worker.observer.leave_to_sweep(self.observation), OUTAGE_SECONDS)


def _last_checkpoint(worker: Worker, claim: Claim) -> Snapshot | None:
    """The state in which an earlier attempt stopped; None if it left none, or none that can be used."""
    key = claim.checkpoint_key
    if key is None or claim.spec.trajectory:
        return None
    try:
        snapshot = checkpoint.unpack(worker.storage.get(key))
    except (FarmError, ValueError) as error:
        log.warning("job_id=%s starts from its first step: %s can't be read: %s", claim.job_id, key, error)
        return None
    log.info("resuming job_id=%s attempt=%d at step=%d", claim.job_id, claim.attempt, snapshot.steps_done)
    return snapshot

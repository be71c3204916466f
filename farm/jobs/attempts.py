"""`Attempts`: what a worker may do with a job that it has claimed, to its end; and what became of each attempt.

Each move names the state that it leaves and the attempt that makes it: a worker that comes too late matches no row.
"""

import logging
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from farm.errors import ErrorClass
from farm.jobs.database import Database, now, now_plus
from farm.jobs.leases import Leases, end_attempts, leave_running
from farm.jobs.queries import in_state
from farm.jobs.records import AttemptInfo, Claim, Picture
from farm.jobs.schema import AttemptRow, JobRow
from farm.jobs.states import JobState, Outcome
from farm.settings import Settings

log = logging.getLogger(__name__)


class Attempts(Leases):
    """Jobs as workers end them."""

    def __init__(self, db: Database, settings: Settings) -> None:
        super().__init__(db, settings)
        self._max_tries = settings.max_tries

    def attempts(self, job_id: str) -> list[AttemptInfo]:
        """What became of each attempt of a job that has ended, in order; the one under way is in the job itself."""
        with self._db.read() as session:
            rows = session.scalars(
                sa.select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.attempt)
            )
            return [
                AttemptInfo(
                    attempt=row.attempt,
                    worker=row.worker,
                    started_at=row.started_at,
                    ended_at=row.ended_at,
                    outcome=Outcome(row.outcome),
                    error_class=ErrorClass(row.error_class) if row.error_class else None,
                    reason=row.reason,
                    steps_done=row.steps_done,
                    device_seconds=row.device_seconds,
                )
                for row in rows
            ]

    def checkpointed(self, claim: Claim, key: str) -> bool:
        """Record the object that a later attempt can go on from; False if the claim no longer holds."""
        with self._db.write() as session:
            row = session.execute(
                sa.update(JobRow).where(*_holds(claim)).values(checkpoint_key=key).returning(JobRow.id)
            ).one_or_none()
        return row is not None

    def leaves(self, claim: Claim) -> bool:
        """Note that a claimed job's worker is about to write objects beside its picture; False if the claim is void.

        Before it writes the first: whatever dies or is away then, the dispatcher looks for them when the job has ended.
        """
        with self._db.write() as session:
            noted = sa.func.coalesce(JobRow.checkpoint_key, "")
            row = session.execute(
                sa.update(JobRow).where(*_holds(claim)).values(checkpoint_key=noted).returning(JobRow.id)
            ).one_or_none()
        return row is not None

    def left_behind(self, claim: Claim) -> None:
        """Note that objects of a claim, void or not, may lie in the object store that a sweep has not seen."""
        with self._db.write() as session:
            noted = sa.func.coalesce(JobRow.checkpoint_key, "")
            session.execute(sa.update(JobRow).where(JobRow.id == claim.job_id).values(checkpoint_key=noted))

    def succeed(self, claim: Claim, picture: Picture) -> bool:
        """Record the picture of a claimed job; False if the claim no longer holds.

        Done again, because the answer of the first time was lost, it is True again. What its attempts left beside the
        picture the worker deletes, or else the dispatcher.
        """
        return bool(self._succeed([(claim, picture)]))

    def succeed_many(self, ended: Sequence[tuple[Claim, Picture]]) -> set[str]:
        """Record pictures as `succeed` does each; returns the ids of the jobs whose claims still held.

        All in one transaction, except for what somebody else has locked.
        """
        recorded = self._succeed(ended, skip_locked=True)
        left = [one for one in ended if one[0].job_id not in recorded]
        return recorded.union(*(self._succeed([one]) for one in left))

    def _succeed(self, ended: Sequence[tuple[Claim, Picture]], *, skip_locked: bool = False) -> set[str]:
        claims = {claim.job_id: claim for claim, _ in ended}
        keys = {claim.job_id: picture.key for claim, picture in ended}
        with self._db.write() as session:
            connection = session.connection()
            found = connection.execute(_CLAIMED_FREE if skip_locked else _CLAIMED, {"ended": list(claims)}).all()
            mine = [row for row in found if row.attempt == claims[row.id].attempt]
            held = {row.id for row in mine if row.state == JobState.RUNNING.value}
            done = {row.id for row in mine if row.image_key == keys[row.id]}
            if held:
                # Each statement counts in its batch: everybody in the same order, so that none wait for each other.
                connection.execute(
                    _SUCCEED,
                    [
                        _succeeded(claim, picture)
                        for claim, picture in sorted(ended, key=lambda one: one[0].batch_id)
                        if claim.job_id in held
                    ],
                )
                connection.execute(_END_SUCCEEDED, {"held": list(held)})
        for job_id in held:
            log.info("ended job_id=%s attempt=%d now=succeeded", job_id, claims[job_id].attempt)
        if not skip_locked:
            for job_id in claims.keys() - held - done:
                log.warning("too late job_id=%s attempt=%d", job_id, claims[job_id].attempt)
        return held | done

    def tries_again(self, claim: Claim, error_class: ErrorClass) -> bool:
        """Whether a claimed job is tried again when this attempt ends with such an error."""
        return error_class.retryable and claim.tries + 1 < self._max_tries

    def fail(self, claim: Claim, error: str, error_class: ErrorClass = ErrorClass.TRANSIENT) -> bool:
        """Record a claimed job's error: back to the backlog, for a while, if it has tries left and another may help.

        The next try starts afresh, since what was checkpointed may be what went wrong: the worker deletes its
        checkpoint before it calls this. Where there was no memory for it, it is left to another worker, if there is
        one. False if the claim no longer holds.
        """
        tries = claim.tries + 1  # nobody else counts them while the claim holds
        again = self.tries_again(claim, error_class)
        left = leave_running(sa.literal((JobState.PENDING if again else JobState.FAILED).value), sa.literal(error))
        back = left["state"] == JobState.PENDING.value
        if error_class is ErrorClass.OUT_OF_MEMORY:
            left["avoid_worker"] = JobRow.worker
        left["checkpoint_key"] = sa.case((back, ""), else_=left["checkpoint_key"])
        return self._end(
            claim,
            {
                "outcome": _unless_cancelled(Outcome.RETRIED if again else Outcome.FAILED),
                "error_class": error_class.value,
                "reason": error,
            },
            tries=tries,
            not_before=now_plus(sa.literal(self._backoff.seconds(tries))) if again else None,
            **left,
        )

    def hand_back(self, claim: Claim, why: str = "its worker stops", *, elsewhere: bool = False) -> bool:
        """Give a claimed job back to the backlog, unrendered, at no cost; False if the claim no longer holds.

        One that is to go `elsewhere` is left to another worker, if there is one, and comes back after a while.
        """
        left = leave_running(sa.literal(JobState.PENDING.value), JobRow.error)
        if elsewhere:
            left |= {"avoid_worker": JobRow.worker, "not_before": now_plus(sa.literal(self._backoff.seconds(1)))}
        return self._end(claim, {"outcome": _unless_cancelled(Outcome.HANDED_BACK), "reason": why}, **left)

    def stopped(self, claim: Claim) -> bool:
        """Record that a claimed job is no longer rendered because it was cancelled; False if the claim is void."""
        return self._end(
            claim,
            {"outcome": Outcome.CANCELLED.value},
            **leave_running(sa.literal(JobState.CANCELLED.value), JobRow.error),
        )

    def _end(self, claim: Claim, ending: dict[str, Any], **values: Any) -> bool:
        with self._db.write() as session:
            held = end_attempts(session, *_claimed(claim), **ending)
            moved = sa.update(JobRow).where(*_holds(claim)).values(**values).returning(JobRow.state)
            state = session.scalar(moved) if held else None
        if state is None:
            log.warning("too late job_id=%s attempt=%d", claim.job_id, claim.attempt)
            return False
        log.info("ended job_id=%s attempt=%d now=%s", claim.job_id, claim.attempt, state)
        return True


# Written once, since to put them together takes as long as to execute them.
_CLAIMED = (
    sa.select(JobRow.id, JobRow.attempt, JobRow.state, JobRow.image_key)
    .where(JobRow.id.in_(sa.bindparam("ended", expanding=True)))
    .with_for_update()
)
# Waits for nobody while it holds some of the rows: so no two transactions can wait for each other.
_CLAIMED_FREE = _CLAIMED.with_for_update(skip_locked=True)
_SUCCEED = (
    sa.update(JobRow)
    .where(
        JobRow.id == sa.bindparam("of_job"), JobRow.attempt == sa.bindparam("of_attempt"), in_state(JobState.RUNNING)
    )
    .values(
        state=JobState.SUCCEEDED.value,
        finished_at=now(),
        lease_until=None,
        error=None,
        **{
            name: sa.bindparam(name)
            for name in (
                "steps_done",
                "image_key",
                "image_sha256",
                "image_bytes",
                "width",
                "height",
                "model_sha256",
                "render_seconds",
                "device_seconds",
                "warnings",
            )
        },
    )
)


_END_SUCCEEDED = sa.insert(AttemptRow).from_select(
    [
        AttemptRow.job_id,
        AttemptRow.attempt,
        AttemptRow.worker,
        AttemptRow.started_at,
        AttemptRow.ended_at,
        AttemptRow.outcome,
        AttemptRow.steps_done,
        AttemptRow.device_seconds,
    ],
    sa.select(
        JobRow.id,
        JobRow.attempt,
        JobRow.worker,
        JobRow.started_at,
        JobRow.finished_at,
        sa.literal(Outcome.SUCCEEDED.value),
        JobRow.steps_done,
        JobRow.device_seconds,
    ).where(JobRow.id.in_(sa.bindparam("held", expanding=True))),
)


def _succeeded(claim: Claim, picture: Picture) -> dict[str, Any]:
    return {
        "of_job": claim.job_id,
        "of_attempt": claim.attempt,
        "steps_done": claim.spec.num_inference_steps,
        "image_key": picture.key,
        "image_sha256": picture.sha256,
        "image_bytes": picture.bytes,
        "width": picture.width,
        "height": picture.height,
        "model_sha256": picture.model_sha256,
        "render_seconds": picture.render_seconds,
        "device_seconds": picture.device_seconds,
        "warnings": list(picture.warnings),
    }


def _claimed(claim: Claim) -> tuple[sa.ColumnElement[bool], ...]:
    return JobRow.id == claim.job_id, JobRow.attempt == claim.attempt


def _holds(claim: Claim) -> tuple[sa.ColumnElement[bool], ...]:
    return *_claimed(claim), in_state(JobState.RUNNING)


def _unless_cancelled(outcome: Outcome) -> sa.ColumnElement[str]:
    return sa.case((JobRow.cancel_requested, Outcome.CANCELLED.value), else_=outcome.value)

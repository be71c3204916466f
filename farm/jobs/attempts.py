"""`Attempts`: a worker's records of the jobs that it has claimed, up to their end.

Each move names the state that it leaves and the attempt that makes it: writes from older attempts are rejected.
"""

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any

import sqlalchemy as sa

from farm.errors import ErrorClass
from farm.jobs.artifacts import PICTURE_COLUMNS, artifact_rows
from farm.jobs.conditions import in_state
from farm.jobs.database import Database, now_plus
from farm.jobs.records import Artifact, Claim, Picture, Success
from farm.jobs.schema import ArtifactRow, JobRow
from farm.jobs.states import JobState, Outcome
from farm.jobs.transitions import Ending, Move, finalize, unless_cancelled, without_worker
from farm.runtime.backoff import Backoff
from farm.settings import Settings

log = logging.getLogger(__name__)


class Attempts:
    """Records what a worker reports of the jobs that it has claimed."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._max_tries = settings.max_tries
        self._backoff = Backoff(settings.retry_seconds, settings.retry_max_seconds)

    def record_checkpoint(self, claim: Claim, key: str) -> bool:
        """Record the object from which a later attempt can resume; False if the claim no longer holds."""
        held = in_state(JobState.RUNNING), JobRow.attempt == claim.attempt
        return self._note(claim, *held, checkpoint_key=key, leftovers=True)

    def expect_objects(self, claim: Claim) -> bool:
        """Note that a worker is about to write objects beside a job's picture; False if the claim no longer holds.

        Called before the first object is written: if the worker dies, the dispatcher looks for them when the job has
        ended.
        """
        return self._note(claim, in_state(JobState.RUNNING), JobRow.attempt == claim.attempt, leftovers=True)

    def report_leftovers(self, claim: Claim) -> None:
        """Note that an attempt, current or not, may have left objects that no sweep has seen."""
        self._note(claim, leftovers=True)

    def _note(self, claim: Claim, *which: sa.ColumnElement[bool], **values: Any) -> bool:
        noted = sa.update(JobRow).where(JobRow.id == claim.job_id, *which).values(**values).returning(JobRow.id)
        with self._db.write() as session:
            return session.execute(noted).one_or_none() is not None

    def succeed(self, claim: Claim, picture: Picture, artifacts: Sequence[Artifact] = ()) -> bool:
        """Record the picture of a claimed job, and the artifacts beside it; False if the claim no longer holds.

        Safe to repeat after a lost answer: it is True again. The worker deletes the leftovers of its attempts, or else
        the dispatcher does.
        """
        return bool(self._succeed([Success(claim, picture, artifacts)]))

    def succeed_many(self, ended: Sequence[Success]) -> set[str]:
        """Record successes as `succeed` does each; returns the ids of the jobs whose claims still held.

        One transaction records them all; locked rows are recorded afterwards, one by one.
        """
        recorded = self._succeed(ended, skip_locked=True)
        left = [success for success in ended if success.claim.job_id not in recorded]
        return recorded.union(*(self._succeed([success]) for success in left))

    def _succeed(self, ended: Sequence[Success], *, skip_locked: bool = False) -> set[str]:
        claims = {success.claim.job_id: success.claim for success in ended}
        keys = {success.claim.job_id: success.picture.key for success in ended}
        with self._db.write() as session:
            query = _CLAIMED_UNLOCKED if skip_locked else _CLAIMED
            found = session.connection().execute(query, {"job_ids": list(claims)}).all()
            mine = [row for row in found if row.attempt == claims[row.id].attempt]
            held = {row.id for row in mine if row.state == JobState.RUNNING.value}
            done = {row.id for row in mine if row.image_key == keys[row.id]}
            if held:
                # Each statement updates the counts of its batch: all transactions take the batches in the same order,
                # so that they can't deadlock.
                in_order = sorted(ended, key=lambda success: success.claim.batch_id)
                recorded = [success for success in in_order if success.claim.job_id in held]
                finalize(session, _SUCCEED, each=[_succeeded(each.claim, each.picture) for each in recorded])
                artifacts = (artifact_rows(each.claim.job_id, each.picture, each.artifacts) for each in recorded)
                session.connection().execute(_INSERT_ARTIFACTS, list(chain.from_iterable(artifacts)))
        if not skip_locked:
            for job_id in claims.keys() - held - done:
                log.warning("too late job_id=%s attempt=%d", job_id, claims[job_id].attempt)
        return held | done

    def tries_again(self, claim: Claim, error_class: ErrorClass) -> bool:
        """Whether a claimed job is tried again when this attempt ends with such an error."""
        return error_class.retryable and claim.tries + 1 < self._max_tries

    def fail(self, claim: Claim, error: str, error_class: ErrorClass = ErrorClass.TRANSIENT) -> bool:
        """Record a claimed job's error; False if the claim no longer holds.

        If the error is retryable and tries are left, the job goes back to the backlog with a back-off. The next try
        starts from the first step, since the checkpoint may be the cause: the worker deletes it before it calls this.
        A job that ran out of memory goes to another worker, if possible.
        """
        tries = claim.tries + 1  # nothing else counts them while the claim holds
        again = self.tries_again(claim, error_class)
        values = without_worker(sa.literal(error))
        if again:
            values |= {"checkpoint_key": None, "not_before": now_plus(sa.literal(self._backoff.seconds(tries)))}
        if error_class is ErrorClass.OUT_OF_MEMORY:
            values["avoid_worker"] = JobRow.worker
        outcome = Outcome.RETRIED if again else Outcome.FAILED
        return self._end(
            claim,
            JobState.PENDING if again else JobState.FAILED,
            Ending(_unless_cancelled(outcome), error_class.value, error),
            **{"tries": tries, "not_before": None, **values},
        )

    def hand_back(self, claim: Claim, why: str = "its worker stops", *, elsewhere: bool = False) -> bool:
        """Return a claimed job to the backlog, unrendered, without counting a try; False if the claim no longer holds.

        With `elsewhere`, the job goes to another worker, if possible, after a back-off.
        """
        values = without_worker(JobRow.error)
        if elsewhere:
            values |= {"avoid_worker": JobRow.worker, "not_before": now_plus(sa.literal(self._backoff.seconds(1)))}
        ending = Ending(_unless_cancelled(Outcome.HANDED_BACK), reason=why)
        return self._end(claim, JobState.PENDING, ending, **values)

    def stopped(self, claim: Claim) -> bool:
        """Record that a claimed job's render was stopped, as requested; False if the claim no longer holds."""
        ending = Ending(Outcome.CANCELLED.value)
        return self._end(claim, JobState.CANCELLED, ending, **without_worker(JobRow.error))

    def _end(self, claim: Claim, to: JobState, ending: Ending, **values: Any) -> bool:
        move = Move({JobState.RUNNING: unless_cancelled(otherwise=to)}, **values)
        with self._db.write() as session:
            held = JobRow.id == claim.job_id, JobRow.attempt == claim.attempt
            ended = bool(finalize(session, move, *held, ending=ending))
        if not ended:
            log.warning("too late job_id=%s attempt=%d", claim.job_id, claim.attempt)
        return ended


# Built once: building a statement takes as long as executing it.
_CLAIMED = (
    sa.select(JobRow.id, JobRow.attempt, JobRow.state, JobRow.image_key)
    .where(JobRow.id.in_(sa.bindparam("job_ids", expanding=True)))
    .with_for_update()
)
# Never waits for a row while it locks others, so that transactions can't deadlock.
_CLAIMED_UNLOCKED = _CLAIMED.with_for_update(skip_locked=True)
_INSERT_ARTIFACTS = sa.insert(ArtifactRow)
_SUCCEED = Move(
    {JobState.RUNNING: JobState.SUCCEEDED},
    lease_until=None,
    error=None,
    steps_done=sa.bindparam("steps_done"),
    **{column: sa.bindparam(column) for column in PICTURE_COLUMNS},
)


def _succeeded(claim: Claim, picture: Picture) -> dict[str, Any]:
    return {
        "of_job": claim.job_id,
        "of_attempt": claim.attempt,
        "steps_done": claim.spec.num_inference_steps,
        **{column: getattr(picture, field) for column, field in PICTURE_COLUMNS.items()},
    }


def _unless_cancelled(outcome: Outcome) -> sa.ColumnElement[str]:
    return sa.case((JobRow.cancel_requested, Outcome.CANCELLED.value), else_=outcome.value)

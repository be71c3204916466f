"""`Attempts`: what a worker may do with a job, from its claim to its end.

Each move names the state that it leaves and the attempt that makes it: a worker that comes too late matches no row.
"""

import logging
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from farm.db import Database, now, now_plus
from farm.queries import JobQueries, in_state
from farm.records import Beat, Claim, Pace, Picture
from farm.schema import BatchRow, JobRow, WorkerRow
from farm.settings import Settings
from farm.spec import RenderSpec
from farm.states import JobState

log = logging.getLogger(__name__)


class Attempts(JobQueries):
    """Jobs as they are claimed, renewed and ended by workers."""

    def __init__(self, db: Database, settings: Settings) -> None:
        super().__init__(db, settings)
        self._max_tries = settings.max_tries

    def claim(self, job_id: str, worker: str) -> Claim | None:
        """Take a queued job under a new lease; None if it is not queued (a duplicate message, or cancelled)."""
        with self._db.write() as session:
            row = session.execute(
                sa.update(JobRow)
                .where(JobRow.id == job_id, in_state(JobState.QUEUED))
                .values(
                    state=JobState.RUNNING.value,
                    attempt=JobRow.attempt + 1,
                    worker=worker,
                    lease_until=now_plus(sa.literal(self._lease_seconds)),
                    started_at=now(),
                    steps_done=0,
                )
                .returning(
                    JobRow.attempt,
                    JobRow.spec,
                    JobRow.batch_id,
                    JobRow.index.label("place"),
                    JobRow.priority,
                    JobRow.checkpoint_key,
                )
            ).one_or_none()
            if row is None:
                return None
            batch = session.get_one(BatchRow, row.batch_id)
            claim = Claim(
                job_id=job_id,
                attempt=row.attempt,
                spec=RenderSpec.model_validate(row.spec),
                batch_id=row.batch_id,
                batch_name=batch.name,
                index=row.place,
                total=batch.total,
                priority=row.priority,
                checkpoint_key=row.checkpoint_key,
            )
        log.info("claimed job_id=%s attempt=%d worker=%s", job_id, claim.attempt, worker)
        return claim

    def beat(self, worker: str, paces: Mapping[tuple[str, int], Pace]) -> Beat:
        """Renew the leases a worker holds, keyed by job id and attempt, and write how far each render is.

        Also the worker's sign of life. One statement for all its jobs.
        """
        held = {job_id for job_id, _ in paces}
        with self._db.write() as session:
            session.execute(sa.update(WorkerRow).where(WorkerRow.name == worker).values(seen_at=now()))
            rows = (
                session.execute(
                    sa.update(JobRow)
                    .where(in_state(JobState.RUNNING), sa.tuple_(JobRow.id, JobRow.attempt).in_(list(paces)))
                    .values(
                        lease_until=now_plus(sa.literal(self._lease_seconds)),
                        steps_done=sa.case(
                            {job_id: pace.steps_done for (job_id, _), pace in paces.items()}, value=JobRow.id
                        ),
                        seconds_per_step=sa.case(
                            {
                                # PostgreSQL takes a NULL without a type for text.
                                job_id: sa.cast(pace.seconds_per_step, sa.Double())
                                for (job_id, _), pace in paces.items()
                            },
                            value=JobRow.id,
                        ),
                    )
                    .returning(
                        JobRow.id,
                        JobRow.cancel_requested,
                        (JobRow.preview_until > now()).label("watched"),
                        JobRow.preview_vae,
                    )
                ).all()
                if paces
                else []
            )
        return Beat(
            cancelled=frozenset(row.id for row in rows if row.cancel_requested),
            lost=frozenset(held - {row.id for row in rows}),
            previews={row.id: row.preview_vae for row in rows if row.watched},
        )

    def checkpointed(self, claim: Claim, key: str) -> bool:
        """Record the object that a later attempt can go on from; False if the claim no longer holds."""
        with self._db.write() as session:
            row = session.execute(
                sa.update(JobRow).where(*_holds(claim)).values(checkpoint_key=key).returning(JobRow.id)
            ).one_or_none()
        return row is not None

    def succeed(self, claim: Claim, picture: Picture) -> bool:
        """Record the picture of a claimed job, and forget its checkpoint, whose object the worker deletes.

        False if the claim no longer holds.
        """
        return self._end(
            claim,
            state=JobState.SUCCEEDED.value,
            finished_at=now(),
            lease_until=None,
            error=None,
            checkpoint_key=None,
            steps_done=claim.spec.num_inference_steps,
            image_key=picture.key,
            image_sha256=picture.sha256,
            image_bytes=picture.bytes,
            width=picture.width,
            height=picture.height,
            model_sha256=picture.model_sha256,
            render_seconds=picture.render_seconds,
            warnings=list(picture.warnings),
        )

    def fail(self, claim: Claim, error: str, *, retryable: bool) -> bool:
        """Record a claimed job's error: back to the backlog while it has tries left and another may help.

        The next try starts afresh, since what was checkpointed may be what went wrong: the worker deletes its
        checkpoint before it calls this. False if the claim no longer holds.
        """
        again = (JobRow.tries + 1 < self._max_tries) if retryable else sa.false()
        state = sa.case((again, JobState.PENDING.value), else_=JobState.FAILED.value)
        left = leave_running(state, sa.literal(error))
        kept = sa.case((left["state"] == JobState.PENDING.value, None), else_=JobRow.checkpoint_key)
        return self._end(claim, tries=JobRow.tries + 1, checkpoint_key=kept, **left)

    def hand_back(self, claim: Claim) -> bool:
        """Give a claimed job back to the backlog, unrendered, at no cost; False if the claim no longer holds."""
        return self._end(claim, **leave_running(sa.literal(JobState.PENDING.value), JobRow.error))

    def stopped(self, claim: Claim) -> bool:
        """Record that a claimed job is no longer rendered because it was cancelled; False if the claim is void."""
        return self._end(claim, **leave_running(sa.literal(JobState.CANCELLED.value), JobRow.error))

    def _end(self, claim: Claim, **values: Any) -> bool:
        with self._db.write() as session:
            row = session.execute(
                sa.update(JobRow).where(*_holds(claim)).values(**values).returning(JobRow.state, JobRow.worker)
            ).one_or_none()
        if row is None:
            log.warning("too late job_id=%s attempt=%d", claim.job_id, claim.attempt)
            return False
        log.info("ended job_id=%s attempt=%d now=%s", claim.job_id, claim.attempt, row.state)
        return True


def _holds(claim: Claim) -> tuple[sa.ColumnElement[bool], ...]:
    return JobRow.id == claim.job_id, JobRow.attempt == claim.attempt, in_state(JobState.RUNNING)


def leave_running(state: sa.ColumnElement[str], error: Any) -> dict[str, Any]:
    """What changes when a running job is rendered no longer: a wish to cancel it comes first."""
    state = sa.case((JobRow.cancel_requested, JobState.CANCELLED.value), else_=state)
    return {
        "state": state,
        "error": error,
        "worker": None,
        "lease_until": None,
        "queued_at": None,
        "steps_done": 0,
        "finished_at": sa.case((state == JobState.PENDING.value, None), else_=now()),
    }

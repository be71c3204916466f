"""`Leases`: a worker's time-limited right to render a job, and what happens to the job when the worker is lost."""

import logging
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.errors import ErrorClass
from farm.jobs.conditions import JOB_PAUSED, in_state
from farm.jobs.database import Database, now, now_plus
from farm.jobs.records import Beat, Claim, Pace
from farm.jobs.schema import BatchRow, JobRow, WorkerRow
from farm.jobs.states import JobState, Outcome
from farm.jobs.transitions import Ending, Move, finalize, unless_cancelled, without_worker
from farm.jobs.workers import live_models
from farm.runtime.backoff import Backoff
from farm.settings import Settings
from farm.specs.spec import RenderSpec

log = logging.getLogger(__name__)

_TAKEN = (
    JobRow.id,
    JobRow.attempt,
    JobRow.tries,
    JobRow.spec,
    JobRow.batch_id,
    JobRow.position.label("position"),  # the connection would name it after its column
    JobRow.priority,
    JobRow.checkpoint_key,
)


class Leases:
    """Claims jobs for workers, and renews, expires and takes back their leases."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._lease_seconds = settings.lease_seconds
        self._max_lost_leases = settings.max_lost_leases
        self._backoff = Backoff(settings.retry_seconds, settings.retry_max_seconds)

    def claim(self, job_id: str, worker: str) -> Claim | None:
        """Claim a queued job under a new lease; None if it is not queued: a duplicate message, or cancelled.

        A job that was paused meanwhile goes back to the backlog instead. So does a job that ran out of memory on this
        worker, while another live worker serves its model.
        """
        wanted = self._wanted([job_id], worker)
        with self._db.write() as session:
            claims = _take(session, _CLAIM, wanted)
            if not claims and not self._put_back(session, job_id, worker):
                claims = _take(session, _CLAIM_AGAIN, wanted)
        return _logged(claims, worker).get(job_id)

    def claim_many(self, job_ids: Collection[str], worker: str) -> dict[str, Claim]:
        """Claim these queued jobs as `claim` does each; returns the claims, by job id.

        One transaction claims them all; locked rows are claimed afterwards, one by one.
        """
        with self._db.write() as session:
            claims = _take(session, _CLAIM_AT_ONCE, self._wanted(job_ids, worker))
        claims = _logged(claims, worker)
        for job_id in job_ids:
            if job_id not in claims and (claim := self.claim(job_id, worker)):
                claims[job_id] = claim
        return claims

    def _wanted(self, job_ids: Collection[str], worker: str) -> dict[str, Any]:
        return {"wanted": list(job_ids), "claimer": worker, "lease_seconds": self._lease_seconds}

    def _put_back(self, session: Session, job_id: str, worker: str) -> bool:
        """Put a queued job that this worker must not claim now back into the backlog; False if it may claim it."""
        found = session.execute(
            sa.select(JobRow.model, JOB_PAUSED.label("paused"))
            .where(JobRow.id == job_id, in_state(JobState.QUEUED))
            .with_for_update()
        ).one_or_none()
        if found is None:
            return True
        if not found.paused and not self._served_elsewhere(session, found.model, worker):
            return False
        later = None if found.paused else now_plus(sa.literal(self._backoff.seconds(1)))
        back = Move({JobState.QUEUED: JobState.PENDING}, queued_at=None, not_before=later)
        session.execute(back.update.where(JobRow.id == job_id))
        why = "it is paused" if found.paused else "no memory for it here, and another worker serves its model"
        log.info("put back job_id=%s worker=%s: %s", job_id, worker, why)
        return True

    def _served_elsewhere(self, session: Session, model: str, worker: str) -> bool:
        others = live_models(session, self._lease_seconds, WorkerRow.name != worker)
        return any(served.name == model for models in others for served in models)

    def beat(self, worker: str, paces: Mapping[tuple[str, int], Pace]) -> Beat:
        """Renew a worker's leases, keyed by job id and attempt, and record the progress of each render.

        This is the worker's heartbeat: one statement for all its jobs.
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
                        JOB_PAUSED.label("paused"),
                        (JobRow.preview_until > now()).label("watched"),
                        JobRow.preview_vae,
                    )
                ).all()
                if paces
                else []
            )
        return Beat(
            cancelled=frozenset(row.id for row in rows if row.cancel_requested),
            paused=frozenset(row.id for row in rows if row.paused),
            lost=frozenset(held - {row.id for row in rows}),
            previews={row.id: row.preview_vae for row in rows if row.watched},
        )

    def reclaim(self, worker: str) -> int:
        """Take back the jobs of a worker that has restarted and so lost them; returns how many."""
        return self._lose(JobRow.worker == worker)

    def expire(self) -> int:
        """Take back running jobs whose lease has expired; returns how many.

        They go back to the backlog, or to cancelled if that was requested, or to failed after too many lost leases,
        since the job may kill its workers. From its second lost lease on, a job waits for a delay of its own, so that a
        job that kills workers is rendered alone.
        """
        return self._lose(JobRow.lease_until < now())

    def _lose(self, which: sa.ColumnElement[bool]) -> int:
        poison = JobRow.lost_leases + 1 >= self._max_lost_leases
        set_aside = f"set aside: its worker was lost {self._max_lost_leases} times while rendering it"
        to = unless_cancelled((poison, JobState.FAILED), otherwise=JobState.PENDING)
        move = Move(
            {JobState.RUNNING: to},
            lost_leases=JobRow.lost_leases + 1,
            not_before=self._apart(),
            **without_worker(sa.case((poison, set_aside), else_=JobRow.error)),
        )
        ending = Ending(
            Outcome.LOST.value,
            error_class=sa.case((poison, ErrorClass.POISON.value), else_=None),
            reason=sa.case((poison, set_aside), else_="no sign of life from its worker"),
        )
        with self._db.write() as session:
            lost = finalize(session, move, which, ending=ending)
        for job_id, attempt, state in lost:
            log.warning("lease lost job_id=%s attempt=%d now=%s", job_id, attempt, state)
        return len(lost)

    def _apart(self) -> sa.ColumnElement[datetime]:
        """When a job may be dispatched after another lost lease: first at once, then after growing delays."""
        later = {n: self._backoff.most_seconds(n) for n in range(1, self._max_lost_leases)}
        if not later:  # the first lost lease sets it aside
            return now()
        seconds = sa.case(later, value=JobRow.lost_leases, else_=0.0) * (0.5 + (JobRow.position % 16) / 32.0)
        return now_plus(seconds)


# Built once: building a statement takes as long as executing it.
_WANTED = JobRow.id.in_(sa.bindparam("wanted", expanding=True))
_MAY_BE_HERE = sa.or_(JobRow.avoid_worker.is_(None), JobRow.avoid_worker != sa.bindparam("claimer"))
_LEASE = Move(
    {JobState.QUEUED: JobState.RUNNING},
    attempt=JobRow.attempt + 1,
    worker=sa.bindparam("claimer"),
    lease_until=now_plus(sa.bindparam("lease_seconds", type_=sa.Double())),
    started_at=now(),
    steps_done=0,
).update.returning(*_TAKEN)
_CLAIM = _LEASE.where(_WANTED, _MAY_BE_HERE, ~JOB_PAUSED)
_CLAIM_AGAIN = _LEASE.where(_WANTED, ~JOB_PAUSED)
# Never waits for a row while it locks others, so that transactions can't deadlock.
_CLAIM_AT_ONCE = _LEASE.where(
    JobRow.id.in_(
        sa.select(JobRow.id)
        .where(_WANTED, in_state(JobState.QUEUED), _MAY_BE_HERE, ~JOB_PAUSED)
        .with_for_update(skip_locked=True)
    )
)
_BATCHES = sa.select(BatchRow.id, BatchRow.name, BatchRow.total, BatchRow.accepted_at, now().label("now")).where(
    BatchRow.id.in_(sa.bindparam("batch_ids", expanding=True))
)


def _take(session: Session, claiming: sa.UpdateBase, wanted: Mapping[str, Any]) -> dict[str, Claim]:
    # By the connection: the session has no instances to synchronize.
    connection = session.connection()
    rows = connection.execute(claiming, wanted).all()
    if not rows:
        return {}
    batch_ids = {"batch_ids": list({row.batch_id for row in rows})}
    batches = {batch.id: batch for batch in connection.execute(_BATCHES, batch_ids)}
    return {
        row.id: Claim(
            job_id=row.id,
            attempt=row.attempt,
            spec=RenderSpec.model_validate(row.spec),
            batch_id=row.batch_id,
            batch_name=batches[row.batch_id].name,
            index=row.position,
            total=batches[row.batch_id].total,
            priority=row.priority,
            checkpoint_key=row.checkpoint_key or None,
            tries=row.tries,
            waited_seconds=_seconds_between(batches[row.batch_id].accepted_at, batches[row.batch_id].now),
        )
        for row in rows
    }


def _seconds_between(earlier: datetime | None, later: datetime) -> float:
    return 0.0 if earlier is None else max(0.0, (later - earlier).total_seconds())


def _logged(claims: dict[str, Claim], worker: str) -> dict[str, Claim]:
    for claim in claims.values():
        log.info("claimed job_id=%s attempt=%d worker=%s", claim.job_id, claim.attempt, worker)
    return claims

"""`Leases`: who renders a job, for how long, and what becomes of the job when its worker is lost.

Every move names the state that it leaves, and every attempt that ends leaves a row: in one transaction, with the jobs
locked in between, so that whoever comes second finds nothing to move.
"""

import logging
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.errors import ErrorClass
from farm.jobs.database import Database, now, now_plus
from farm.jobs.queries import JobQueries, in_state
from farm.jobs.records import Beat, Claim, Pace, WorkerInfo
from farm.jobs.schema import AttemptRow, BatchRow, JobRow, OwnerRow, WorkerRow
from farm.jobs.served_models import served_columns, served_models
from farm.jobs.states import JobState, Outcome
from farm.runtime.backoff import Backoff
from farm.settings import Settings
from farm.specs.spec import RenderSpec

log = logging.getLogger(__name__)

_PAUSED = sa.or_(
    JobRow.paused,
    sa.exists()
    .where(
        BatchRow.id == JobRow.batch_id,
        sa.or_(BatchRow.paused, sa.exists().where(OwnerRow.name == BatchRow.owner, OwnerRow.paused)),
    )
    .correlate(JobRow),
)
"""That a job is paused: by itself, with its batch, or with its owner."""

_TAKEN = (
    JobRow.id,
    JobRow.attempt,
    JobRow.tries,
    JobRow.spec,
    JobRow.batch_id,
    JobRow.index.label("place"),
    JobRow.priority,
    JobRow.checkpoint_key,
)


class Leases(JobQueries):
    """Workers as they come and go, and the leases that they hold on jobs."""

    def __init__(self, db: Database, settings: Settings) -> None:
        super().__init__(db, settings)
        self._max_lost_leases = settings.max_lost_leases
        self._backoff = Backoff(settings.retry_seconds, settings.retry_max_seconds)

    # --- the worker's start and end -----------------------------------------------------------------------------

    def introduce(self, worker: WorkerInfo) -> int:
        """Record a worker that has just started, and take back what an earlier one of its name had left: how many."""
        values = {
            "device": worker.device,
            "dtype": worker.dtype,
            "slots": worker.slots,
            "version": worker.version,
            **served_columns(worker.models, worker.memory),
            "metrics_url": worker.metrics_url,
            "started_at": now(),
            "seen_at": now(),
        }
        with self._db.write() as session:
            session.execute(sa.delete(WorkerRow).where(WorkerRow.name == worker.name))
            session.execute(sa.insert(WorkerRow).values(name=worker.name, **values))
        return self._lose(JobRow.worker == worker.name)

    def describe(self, worker: WorkerInfo) -> None:
        """Record the models of a worker and its device's memory as they are now."""
        with self._db.write() as session:
            values = served_columns(worker.models, worker.memory)
            session.execute(sa.update(WorkerRow).where(WorkerRow.name == worker.name).values(values))

    def leave(self, worker: str) -> None:
        """Forget a worker that has stopped in good order."""
        with self._db.write() as session:
            session.execute(sa.delete(WorkerRow).where(WorkerRow.name == worker))

    # --- leases -------------------------------------------------------------------------------------------------

    def claim(self, job_id: str, worker: str) -> Claim | None:
        """Take a queued job under a new lease; None if it is not queued (a duplicate message, or cancelled).

        One that was paused on its way here goes back to the backlog instead, and so does one that ran out of memory
        here, while another live worker serves its model.
        """
        queued = (JobRow.id == job_id, in_state(JobState.QUEUED))
        wanted = self._wanted([job_id], worker)
        with self._db.write() as session:
            claims = _take(session, _CLAIM, wanted)
            if not claims and not self._put_back(session, job_id, worker, *queued):
                claims = _take(session, _CLAIM_AGAIN, wanted)
        return _told(claims, worker).get(job_id)

    def claim_many(self, job_ids: Collection[str], worker: str) -> dict[str, Claim]:
        """Take these queued jobs as `claim` does each; returns, by id, those that were to be had.

        All in one transaction, except for what can't be had at once.
        """
        with self._db.write() as session:
            claims = _take(session, _CLAIM_AT_ONCE, self._wanted(job_ids, worker))
        claims = _told(claims, worker)
        for job_id in job_ids:
            if job_id not in claims and (claim := self.claim(job_id, worker)):
                claims[job_id] = claim
        return claims

    def _wanted(self, job_ids: Collection[str], worker: str) -> dict[str, Any]:
        return {"wanted": list(job_ids), "claimer": worker, "lease_seconds": self._lease_seconds}

    def _put_back(self, session: Session, job_id: str, worker: str, *queued: sa.ColumnElement[bool]) -> bool:
        """Whether a queued job is not for this worker to take now, and is back in the backlog if it was there."""
        found = session.execute(
            sa.select(JobRow.model, _PAUSED.label("paused")).where(*queued).with_for_update()
        ).one_or_none()
        if found is None:
            return True
        if not found.paused and not self._served_elsewhere(session, found.model, worker):
            return False
        later = None if found.paused else now_plus(sa.literal(self._backoff.seconds(1)))
        session.execute(
            sa.update(JobRow).where(*queued).values(state=JobState.PENDING.value, queued_at=None, not_before=later)
        )
        why = "it is paused" if found.paused else "no memory for it here, and another worker serves its model"
        log.info("put back job_id=%s worker=%s: %s", job_id, worker, why)
        return True

    def _served_elsewhere(self, session: Session, model: str, worker: str) -> bool:
        alive = WorkerRow.seen_at > now_plus(sa.literal(-self._lease_seconds))
        others = session.scalars(sa.select(WorkerRow.models).where(WorkerRow.name != worker, alive))
        return any(served.name == model for models in others for served in served_models(models))

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
                        _PAUSED.label("paused"),
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

    def expire_leases(self) -> int:
        """Take running jobs from workers whose lease ran out; returns how many.

        They go back to the backlog, or to cancelled if somebody asked for it, or to failed if they have now lost
        their worker so often that they may be what kills it. Who lost more than one waits a while, each its own: the
        one that is to blame comes to be alone.
        """
        return self._lose(JobRow.lease_until < now())

    def _lose(self, *which: sa.ColumnElement[bool]) -> int:
        poison = JobRow.lost_leases + 1 >= self._max_lost_leases
        set_aside = f"set aside: its worker was lost {self._max_lost_leases} times while rendering it"
        back, failed = sa.literal(JobState.PENDING.value), sa.literal(JobState.FAILED.value)
        with self._db.write() as session:
            job_ids = end_attempts(
                session,
                *which,
                outcome=sa.literal(Outcome.LOST.value),
                error_class=sa.case((poison, ErrorClass.POISON.value), else_=None),
                reason=sa.case((poison, set_aside), else_="no sign of life from its worker"),
            )
            lost = session.execute(
                sa.update(JobRow)
                .where(in_state(JobState.RUNNING), JobRow.id.in_(job_ids))
                .values(
                    lost_leases=JobRow.lost_leases + 1,
                    not_before=self._apart(),
                    **leave_running(
                        sa.case((poison, failed), else_=back), sa.case((poison, set_aside), else_=JobRow.error)
                    ),
                )
                .returning(JobRow.id, JobRow.attempt, JobRow.state)
            ).all()
        for row in lost:
            log.warning("lease lost job_id=%s attempt=%d now=%s", row.id, row.attempt, row.state)
        return len(lost)

    def _apart(self) -> sa.ColumnElement[datetime]:
        """When a job that has now lost one more worker may come back: at once, then later and later."""
        later = {n: self._backoff.most_seconds(n) for n in range(1, self._max_lost_leases)}
        if not later:  # the first one sets it aside
            return now()
        seconds = sa.case(later, value=JobRow.lost_leases, else_=0.0) * (0.5 + (JobRow.index % 16) / 32.0)
        return now_plus(seconds)


# Written once, since to put them together takes as long as to execute them.
_WANTED = (JobRow.id.in_(sa.bindparam("wanted", expanding=True)), in_state(JobState.QUEUED))
_MAY_BE_HERE = sa.or_(JobRow.avoid_worker.is_(None), JobRow.avoid_worker != sa.bindparam("claimer"))
_LEASE = (
    sa.update(JobRow)
    .values(
        state=JobState.RUNNING.value,
        attempt=JobRow.attempt + 1,
        worker=sa.bindparam("claimer"),
        lease_until=now_plus(sa.bindparam("lease_seconds", type_=sa.Double())),
        started_at=now(),
        steps_done=0,
    )
    .returning(*_TAKEN)
)
_CLAIM = _LEASE.where(*_WANTED, _MAY_BE_HERE, ~_PAUSED)
_CLAIM_AGAIN = _LEASE.where(*_WANTED, ~_PAUSED)
# Waits for nobody while it holds some of the rows: so no two transactions can wait for each other.
_CLAIM_AT_ONCE = _LEASE.where(
    JobRow.id.in_(sa.select(JobRow.id).where(*_WANTED, _MAY_BE_HERE, ~_PAUSED).with_for_update(skip_locked=True)),
    in_state(JobState.QUEUED),
)
_BATCHES = sa.select(BatchRow.id, BatchRow.name, BatchRow.total, BatchRow.accepted_at, now().label("now")).where(
    BatchRow.id.in_(sa.bindparam("batch_ids", expanding=True))
)


def _take(session: Session, claiming: sa.UpdateBase, wanted: Mapping[str, Any]) -> dict[str, Claim]:
    # By the connection: the session has nothing in memory that it would have to bring up to date.
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
            index=row.place,
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


def _told(claims: dict[str, Claim], worker: str) -> dict[str, Claim]:
    for claim in claims.values():
        log.info("claimed job_id=%s attempt=%d worker=%s", claim.job_id, claim.attempt, worker)
    return claims


def end_attempts(
    session: Session,
    *which: sa.ColumnElement[bool],
    outcome: Any,
    error_class: Any = None,
    reason: Any = None,
    steps_done: Any = JobRow.steps_done,
    device_seconds: float | None = None,
) -> list[str]:
    """Write what became of the attempts of these running jobs, and lock the jobs until the transaction ends.

    Returns their ids. Whoever calls moves them out of running.
    """
    ending = (
        sa.select(
            JobRow.id,
            JobRow.attempt,
            JobRow.worker,
            JobRow.started_at,
            now(),
            sa.cast(outcome, AttemptRow.outcome.type),
            sa.cast(error_class, AttemptRow.error_class.type),
            sa.cast(reason, AttemptRow.reason.type),
            sa.cast(steps_done, AttemptRow.steps_done.type),
            sa.cast(device_seconds, AttemptRow.device_seconds.type),
        )
        .where(in_state(JobState.RUNNING), *which)
        .order_by(JobRow.id)
        .with_for_update()
    )
    written = sa.insert(AttemptRow).from_select([column.name for column in AttemptRow.__table__.columns], ending)
    return list(session.scalars(written.returning(AttemptRow.job_id)))


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
        "checkpoint_key": sa.func.coalesce(JobRow.checkpoint_key, ""),
        "finished_at": sa.case((state == JobState.PENDING.value, None), else_=now()),
    }

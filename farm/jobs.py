"""`JobStore`: the only writer of job state.

Every move of a job is one statement that names the state it leaves, and a worker's also the attempt it holds:
whoever comes second matches no row and learns that it was too late.
"""

import logging
from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.attempts import Attempts, leave_running
from farm.broker import Doorbell
from farm.db import Database, now, now_plus
from farm.queries import ACCEPTED, STALE, in_state, models_in
from farm.records import WorkerInfo
from farm.schema import BatchRow, JobRow, OwnerRow, WorkerRow
from farm.settings import Settings
from farm.states import ACTIVE, JobState
from farm.submissions import Submissions

log = logging.getLogger(__name__)

_DISPATCH_LOCK = 0x66617264


class JobStore(Submissions, Attempts):
    """Jobs in SQL: submitted, dispatched, claimed, renewed, ended."""

    def __init__(self, db: Database, settings: Settings) -> None:
        super().__init__(db, settings)
        self._max_lost_leases = settings.max_lost_leases

    # --- the producer ---------------------------------------------------------------------------------------

    def cancel(self, *, batch_id: str | None = None, job_id: str | None = None) -> int:
        """Cancel what has not ended of a batch or a job; returns how many jobs that were.

        What waits is cancelled at once; what runs is marked, and its worker stops it and reports.
        """
        which = JobRow.batch_id == batch_id if batch_id is not None else JobRow.id == job_id
        running = in_state(JobState.RUNNING)
        with self._db.write() as session:
            # One statement: between two, a job could step from the state of one into that of the other.
            changed = session.execute(
                sa.update(JobRow)
                .where(which, JobRow.state.in_(ACTIVE))
                .values(
                    cancel_requested=True,
                    state=sa.case((running, JobRow.state), else_=JobState.CANCELLED.value),
                    finished_at=sa.case((running, None), else_=now()),
                )
                .returning(JobRow.id)
            ).all()
        log.info("cancelled batch_id=%s job_id=%s jobs=%d", batch_id, job_id, len(changed))
        return len(changed)

    def want_preview(self, job_id: str, *, vae: bool, seconds: float = 30) -> bool:
        """Ask a job's worker to show how it gets on, for that many seconds; False if it has ended, or is not there.

        Who asks last decides whether it is decoded by the VAE. A job that waits remembers the wish.
        """
        with self._db.write() as session:
            row = session.execute(
                sa.update(JobRow)
                .where(JobRow.id == job_id, JobRow.state.in_(ACTIVE))
                .values(preview_until=now_plus(sa.literal(float(seconds))), preview_vae=vae)
                .returning(JobRow.id)
            ).one_or_none()
        return row is not None

    # --- the dispatcher -------------------------------------------------------------------------------------

    def enqueue(self, window: int) -> list[Doorbell]:
        """Move jobs from the backlog to queued, in serving order, until each model has a window of them there.

        The caller publishes what comes back, in this order, after this has committed.
        """
        bells: list[Doorbell] = []
        with self._db.write() as session:
            self._db.exclusive(session, _DISPATCH_LOCK)
            for model in models_in(session, JobState.PENDING):
                lying = session.scalar(
                    sa.select(sa.func.count())
                    .select_from(JobRow)
                    .where(in_state(JobState.QUEUED), JobRow.model == model)
                )
                room = window - (lying or 0)
                if room > 0:
                    bells += self._enqueue_model(session, model, room)
        return bells

    def _enqueue_model(self, session: Session, model: str, room: int) -> list[Doorbell]:
        line = (JobRow.priority.desc(), BatchRow.created_at, BatchRow.id, JobRow.index)
        ids = session.scalars(
            sa.select(JobRow.id)
            .join(BatchRow)
            .outerjoin(OwnerRow, OwnerRow.name == BatchRow.owner)
            .where(
                in_state(JobState.PENDING),
                JobRow.model == model,
                ACCEPTED,
                sa.or_(JobRow.not_before.is_(None), JobRow.not_before <= now()),
                ~JobRow.paused,
                ~BatchRow.paused,
                ~sa.func.coalesce(OwnerRow.paused, sa.false()),
            )
            .order_by(*line)
            .limit(room)
        ).all()
        moved = session.scalars(
            sa.update(JobRow)
            .where(JobRow.id.in_(ids), in_state(JobState.PENDING))
            .values(state=JobState.QUEUED.value, queued_at=now())
            .returning(JobRow.id)
        ).all()
        rows = session.execute(
            sa.select(
                JobRow.id, JobRow.spec, JobRow.index.label("place"), JobRow.priority, BatchRow.name, BatchRow.total
            )
            .join(BatchRow)
            .where(JobRow.id.in_(moved))
            .order_by(*line)
        )
        return [
            Doorbell(
                job_id=row.id,
                model=model,
                priority=row.priority,
                # The prompt early: Flower's page cuts a long text short.
                shown=f"{_shortened(row.name, 40)} {row.place}/{row.total}: {_shortened(row.spec['prompt'], 80)} "
                f"(model {model})",
            )
            for row in rows
        ]

    def unqueue(self, job_ids: Sequence[str]) -> int:
        """Put queued jobs back into the backlog: their messages were not published, or are gone; returns how many."""
        with self._db.write() as session:
            moved = session.execute(
                sa.update(JobRow)
                .where(in_state(JobState.QUEUED), JobRow.id.in_(job_ids))
                .values(state=JobState.PENDING.value, queued_at=None)
                .returning(JobRow.id)
            ).all()
        return len(moved)

    def expire_leases(self) -> int:
        """Take running jobs from workers whose lease ran out; returns how many.

        They go back to the backlog, or to cancelled if somebody asked for it, or to failed if they have now lost
        their worker so often that they may be what kills it.
        """
        return self._lose_leases(JobRow.lease_until < now())

    def _lose_leases(self, *which: sa.ColumnElement[bool]) -> int:
        poison = JobRow.lost_leases + 1 >= self._max_lost_leases
        with self._db.write() as session:
            lost = session.execute(
                sa.update(JobRow)
                .where(in_state(JobState.RUNNING), *which)
                .values(
                    lost_leases=JobRow.lost_leases + 1,
                    **leave_running(
                        sa.case((poison, JobState.FAILED.value), else_=JobState.PENDING.value),
                        sa.case(
                            (
                                poison,
                                f"set aside: its worker was lost {self._max_lost_leases} times while rendering it",
                            ),
                            else_=JobRow.error,
                        ),
                    ),
                )
                .returning(JobRow.id, JobRow.attempt, JobRow.state)
            ).all()
        for row in lost:
            log.warning("lease lost job_id=%s attempt=%d now=%s", row.id, row.attempt, row.state)
        return len(lost)

    def forget_checkpoints(self, job_ids: Sequence[str]) -> None:
        """Record that the checkpoints of these jobs, which have ended, are deleted."""
        with self._db.write() as session:
            session.execute(sa.update(JobRow).where(*STALE, JobRow.id.in_(job_ids)).values(checkpoint_key=None))

    # --- the worker's start and end -----------------------------------------------------------------------------

    def introduce(self, worker: WorkerInfo) -> None:
        """Record a worker that has just started, and take back what an earlier one of its name had left."""
        values = {
            "device": worker.device,
            "dtype": worker.dtype,
            "slots": worker.slots,
            "version": worker.version,
            "models": [dict(model) for model in worker.models],
            "started_at": now(),
            "seen_at": now(),
        }
        with self._db.write() as session:
            session.execute(sa.delete(WorkerRow).where(WorkerRow.name == worker.name))
            session.execute(sa.insert(WorkerRow).values(name=worker.name, **values))
        self._lose_leases(JobRow.worker == worker.name)

    def leave(self, worker: str) -> None:
        """Forget a worker that has stopped in good order."""
        with self._db.write() as session:
            session.execute(sa.delete(WorkerRow).where(WorkerRow.name == worker))


def _shortened(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"

"""`JobStore`: the only writer of job state.

Every move of a job is one statement that names the state it leaves, and a worker's also the attempt it holds:
whoever comes second matches no row and learns that it was too late.
"""

import logging
from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.broker import Doorbell
from farm.db import now, now_plus
from farm.queries import ACCEPTED, STALE, in_state, models_in
from farm.schema import BatchRow, JobRow, OwnerRow
from farm.states import ACTIVE, JobState
from farm.steering import Steering
from farm.submissions import Submissions

log = logging.getLogger(__name__)

_DISPATCH_LOCK = 0x66617264


class JobStore(Submissions, Steering):
    """Jobs in SQL: submitted, dispatched, claimed, renewed, ended."""

    # --- the producer ---------------------------------------------------------------------------------------

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

    def forget_checkpoints(self, job_ids: Sequence[str]) -> None:
        """Record that the checkpoints of these jobs, which have ended, are deleted."""
        with self._db.write() as session:
            session.execute(sa.update(JobRow).where(*STALE, JobRow.id.in_(job_ids)).values(checkpoint_key=None))


def _shortened(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"

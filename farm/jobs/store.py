"""`JobStore`: the only writer of job state.

Every move of a job is one statement that names the state it leaves, and a worker's also the attempt it holds:
whoever comes second matches no row and learns that it was too late.
"""

from collections.abc import Sequence

import sqlalchemy as sa

from farm.jobs.backlog import Backlog
from farm.jobs.database import now_plus
from farm.jobs.endings import Endings
from farm.jobs.overview import Overview
from farm.jobs.queries import STALE, in_state
from farm.jobs.reuse import Reuse
from farm.jobs.schema import JobRow
from farm.jobs.states import ACTIVE, JobState
from farm.jobs.steering import Steering
from farm.jobs.submissions import Submissions


class JobStore(Submissions, Backlog, Steering, Endings, Overview, Reuse):
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

    def forget_leftovers(self, job_ids: Sequence[str]) -> None:
        """Record that what these jobs, which have ended, left beside their pictures is deleted."""
        with self._db.write() as session:
            session.execute(sa.update(JobRow).where(*STALE, JobRow.id.in_(job_ids)).values(checkpoint_key=None))

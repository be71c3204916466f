"""`Steering`: what people do with jobs that they have handed in."""

import logging

import sqlalchemy as sa

from farm.attempts import Attempts
from farm.db import now
from farm.queries import in_state
from farm.schema import JobRow
from farm.states import ACTIVE, JobState

log = logging.getLogger(__name__)


class Steering(Attempts):
    """Jobs as people cancel them, and have them tried anew."""

    def cancel(self, *, batch_id: str | None = None, job_id: str | None = None) -> int:
        """Cancel what has not ended of a batch or a job; returns how many jobs that were.

        What waits is cancelled at once; what runs is marked, and its worker stops it and reports.
        """
        running = in_state(JobState.RUNNING)
        with self._db.write() as session:
            # One statement: between two, a job could step from the state of one into that of the other.
            changed = session.execute(
                sa.update(JobRow)
                .where(_which(batch_id, job_id), JobRow.state.in_(ACTIVE))
                .values(
                    cancel_requested=True,
                    state=sa.case((running, JobRow.state), else_=JobState.CANCELLED.value),
                    finished_at=sa.case((running, None), else_=now()),
                )
                .returning(JobRow.id)
            ).all()
        log.info("cancelled batch_id=%s job_id=%s jobs=%d", batch_id, job_id, len(changed))
        return len(changed)

    def retry(self, *, batch_id: str | None = None, job_id: str | None = None) -> int:
        """Give the failed jobs of a batch, or a failed job, all their tries anew; returns how many jobs that were.

        The one exception to what has ended never changing. They start afresh; their attempts count on.
        """
        with self._db.write() as session:
            changed = session.execute(
                sa.update(JobRow)
                .where(_which(batch_id, job_id), in_state(JobState.FAILED))
                .values(
                    state=JobState.PENDING.value,
                    tries=0,
                    lost_leases=0,
                    error=None,
                    not_before=None,
                    avoid_worker=None,
                    # Its object may be on its way out; what is left of it goes when the job has succeeded.
                    checkpoint_key=None,
                    finished_at=None,
                )
                .returning(JobRow.id)
            ).all()
        log.info("to be tried anew batch_id=%s job_id=%s jobs=%d", batch_id, job_id, len(changed))
        return len(changed)


def _which(batch_id: str | None, job_id: str | None) -> sa.ColumnElement[bool]:
    return JobRow.batch_id == batch_id if batch_id is not None else JobRow.id == job_id

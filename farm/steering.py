"""`Steering`: what people do with what they have handed in: cancel, pause, resume, try anew.

Each takes a batch, a job, or an owner, who is all batches of that name, those to come included.
"""

import logging
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.attempts import Attempts
from farm.db import now
from farm.queries import in_state
from farm.schema import BatchRow, JobRow, OwnerRow
from farm.states import ACTIVE, JobState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Which:
    """The jobs that somebody means: exactly one of the three is set."""

    batch_id: str | None = None
    job_id: str | None = None
    owner: str | None = None

    def __post_init__(self) -> None:
        if sum(part is not None for part in (self.batch_id, self.job_id, self.owner)) != 1:
            raise ValueError("say a batch, a job or an owner: exactly one of them")

    @property
    def jobs(self) -> sa.ColumnElement[bool]:
        """That a job is one of them."""
        if self.owner is not None:
            return JobRow.batch_id.in_(sa.select(BatchRow.id).where(BatchRow.owner == self.owner))
        return JobRow.batch_id == self.batch_id if self.batch_id is not None else JobRow.id == self.job_id

    @property
    def batches(self) -> sa.ColumnElement[bool]:
        """That a batch has some of them."""
        if self.owner is not None:
            return BatchRow.owner == self.owner
        of_job = sa.select(JobRow.batch_id).where(JobRow.id == self.job_id).scalar_subquery()
        return BatchRow.id == (self.batch_id if self.batch_id is not None else of_job)


class Steering(Attempts):
    """Jobs as people steer them."""

    def cancel(self, *, batch_id: str | None = None, job_id: str | None = None, owner: str | None = None) -> int:
        """Cancel what has not ended; returns how many jobs that were.

        What waits is cancelled at once; what runs is marked, and its worker stops it and reports.
        """
        which = Which(batch_id, job_id, owner)
        running = in_state(JobState.RUNNING)
        with self._db.write() as session:
            # One statement: between two, a job could step from the state of one into that of the other.
            count = _changed(
                session,
                which.jobs,
                JobRow.state.in_(ACTIVE),
                cancel_requested=True,
                state=sa.case((running, JobRow.state), else_=JobState.CANCELLED.value),
                finished_at=sa.case((running, None), else_=now()),
            )
        log.info("cancelled %s jobs=%d", which, count)
        return count

    def pause(self, *, batch_id: str | None = None, job_id: str | None = None, owner: str | None = None) -> int:
        """Let nothing of it be rendered until `resume`; returns how many jobs that holds up now.

        What lies in Redis goes back to the backlog; what runs, its worker hands back after its next step, with its
        state, so that it goes on from there. What has not begun, and what is still to come, waits.
        """
        which = Which(batch_id, job_id, owner)
        with self._db.write() as session:
            self._set_paused(session, which, paused=True)
            _changed(session, which.jobs, in_state(JobState.QUEUED), state=JobState.PENDING.value, queued_at=None)
            count = _active(session, which)
        log.info("paused %s jobs=%d", which, count)
        return count

    def resume(self, *, batch_id: str | None = None, job_id: str | None = None, owner: str | None = None) -> int:
        """Let it be rendered again; returns how many of its jobs have not ended.

        Each pause ends by itself: a job of a batch that goes on stays paused if it was paused alone, or its owner is.
        """
        which = Which(batch_id, job_id, owner)
        with self._db.write() as session:
            self._set_paused(session, which, paused=False)
            count = _active(session, which)
        log.info("resumed %s jobs=%d", which, count)
        return count

    def _set_paused(self, session: Session, which: Which, *, paused: bool) -> None:
        if which.job_id is not None:
            _changed(session, which.jobs, JobRow.state.in_(ACTIVE), paused=paused)
        elif which.batch_id is not None:
            session.execute(sa.update(BatchRow).where(BatchRow.id == which.batch_id).values(paused=paused))
        else:
            owner = session.get(OwnerRow, which.owner) or OwnerRow(name=which.owner)
            owner.paused = paused
            session.add(owner)
            session.flush()

    def retry(self, *, batch_id: str | None = None, job_id: str | None = None, owner: str | None = None) -> int:
        """Give what has failed all its tries anew; returns how many jobs that were.

        The one exception to what has ended never changing. They start afresh; their attempts count on.
        """
        which = Which(batch_id, job_id, owner)
        with self._db.write() as session:
            count = _changed(
                session,
                which.jobs,
                in_state(JobState.FAILED),
                state=JobState.PENDING.value,
                tries=0,
                lost_leases=0,
                error=None,
                not_before=None,
                avoid_worker=None,
                # Its object may be on its way out; what is left of it goes when the job has ended again.
                checkpoint_key="",
                finished_at=None,
            )
            # After the jobs: who notes a batch's end meanwhile has either not seen these, and is put right here, or
            # waits for this row, and sees them then.
            session.execute(sa.update(BatchRow).where(which.batches).values(ended_at=None))
        log.info("to be tried anew %s jobs=%d", which, count)
        return count


def _changed(session: Session, *where: sa.ColumnElement[bool], **values: Any) -> int:
    changed = session.connection().execute(sa.update(JobRow).where(*where).values(**values))
    return changed.rowcount


def _active(session: Session, which: Which) -> int:
    query = sa.select(sa.func.count()).select_from(JobRow).where(which.jobs, JobRow.state.in_(ACTIVE))
    return session.scalar(query) or 0

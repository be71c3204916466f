"""`Steering`: cancels, pauses, resumes and retries jobs at the request of users.

Each method takes a batch, a job, or an owner: all batches of that owner. Pausing an owner also pauses later batches;
batches whose submission is not complete are not cancelled.
"""

import logging
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.jobs.conditions import VISIBLE
from farm.jobs.database import Database, now_plus
from farm.jobs.schema import BatchRow, JobCountRow, JobRow
from farm.jobs.states import ACTIVE, JobState
from farm.jobs.transitions import UNQUEUE, Move, finalize

log = logging.getLogger(__name__)

_Where = sa.ColumnElement[bool]

_PIECE = 2000
"""How many jobs a transaction changes: some 40 ms, during which workers that renew their leases wait."""
_REST_SECONDS = 0.02
"""The pause between pieces, in which others can write: SQLite has one writer."""


@dataclass(frozen=True)
class Which:
    """A selection of jobs: those of a batch, one job, or those of an owner."""

    batch_id: str | None = None
    job_id: str | None = None
    owner: str | None = None

    def __post_init__(self) -> None:
        if sum(part is not None for part in (self.batch_id, self.job_id, self.owner)) != 1:
            raise ValueError("say a batch, a job or an owner: exactly one of them")

    @property
    def jobs(self) -> _Where:
        """The condition for its jobs."""
        if self.owner is not None:
            return JobRow.batch_id.in_(sa.select(BatchRow.id).where(BatchRow.owner == self.owner))
        return JobRow.batch_id == self.batch_id if self.batch_id is not None else JobRow.id == self.job_id

    @property
    def batches(self) -> _Where:
        """The condition for the batches of its jobs."""
        if self.owner is not None:
            return BatchRow.owner == self.owner
        of_job = sa.select(JobRow.batch_id).where(JobRow.id == self.job_id).scalar_subquery()
        return BatchRow.id == (self.batch_id if self.batch_id is not None else of_job)


class Steering:
    """Cancels, pauses, resumes and retries jobs, and requests their previews."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def cancel(self, *, batch_id: str | None = None, job_id: str | None = None, owner: str | None = None) -> int:
        """Cancel the active jobs; returns how many.

        Waiting jobs end at once. Running jobs are marked, and their workers stop them and report it. Many jobs are
        cancelled some thousands at a time; an interrupted call can be repeated.
        """
        which = Which(batch_id, job_id, owner)
        count = 0
        for jobs, _ in self._pieces(which, ACTIVE):

            def cancel(session: Session, jobs: _Where = jobs) -> int:
                return len(finalize(session, _CANCEL, jobs))

            count += self._db.written(cancel)
        log.info("cancelled %s jobs=%d", which, count)
        return count

    def pause(self, *, batch_id: str | None = None, job_id: str | None = None, owner: str | None = None) -> int:
        """Stop rendering until `resume`; returns how many active jobs that holds up.

        Queued jobs go back to the backlog. Workers hand running jobs back after their next step, with a checkpoint to
        resume from.
        """
        which = Which(batch_id, job_id, owner)

        def pause(session: Session) -> int:
            self._set_paused(session, which, paused=True)
            session.connection().execute(UNQUEUE.update.where(which.jobs))
            return _active(session, which)

        count = self._db.written(pause)
        log.info("paused %s jobs=%d", which, count)
        return count

    def resume(self, *, batch_id: str | None = None, job_id: str | None = None, owner: str | None = None) -> int:
        """End a pause; returns the number of active jobs.

        Pauses are independent: a job stays paused while it, its batch or its owner is paused in another way.
        """
        which = Which(batch_id, job_id, owner)

        def resume(session: Session) -> int:
            self._set_paused(session, which, paused=False)
            return _active(session, which)

        count = self._db.written(resume)
        log.info("resumed %s jobs=%d", which, count)
        return count

    def _set_paused(self, session: Session, which: Which, *, paused: bool) -> None:
        if which.job_id is not None:
            session.execute(sa.update(JobRow).where(which.jobs, JobRow.state.in_(ACTIVE)).values(paused=paused))
        elif which.batch_id is not None:
            session.execute(sa.update(BatchRow).where(BatchRow.id == which.batch_id).values(paused=paused))
        else:
            # The dispatcher may insert an owner's first row at the same time.
            first = "INSERT INTO owners (name, paused) VALUES (:name, :paused) "
            again = "ON CONFLICT (name) DO UPDATE SET paused = excluded.paused"
            session.execute(sa.text(first + again), {"name": which.owner, "paused": paused})

    def retry(self, *, batch_id: str | None = None, job_id: str | None = None, owner: str | None = None) -> int:
        """Retry the failed jobs, with all tries again; returns how many.

        The only move out of a terminal state. The jobs start from the first step; their attempts are not reset.
        Many jobs are retried some thousands at a time, as `cancel` does.
        """
        which = Which(batch_id, job_id, owner)
        count = 0
        for jobs, batch in self._pieces(which, (JobState.FAILED,)):

            def retry(session: Session, jobs: _Where = jobs, batch: _Where = batch) -> int:
                retried = finalize(session, _RETRY, jobs)
                if retried:
                    # After the jobs: a process that notes the batch's end meanwhile either has not seen them, and is
                    # corrected here, or waits for this row and then sees them.
                    session.execute(sa.update(BatchRow).where(batch).values(ended_at=None))
                return len(retried)

            count += self._db.written(retry)
        log.info("retried %s jobs=%d", which, count)
        return count

    def request_preview(self, job_id: str, *, vae: bool, seconds: float = 30) -> bool:
        """Ask for previews of a job for that many seconds; False if it has ended, or does not exist.

        The latest request decides whether previews are decoded by the VAE. A waiting job keeps the request.
        """
        with self._db.write() as session:
            row = session.execute(
                sa.update(JobRow)
                .where(JobRow.id == job_id, JobRow.state.in_(ACTIVE))
                .values(preview_until=now_plus(sa.literal(float(seconds))), preview_vae=vae)
                .returning(JobRow.id)
            ).one_or_none()
        return row is not None

    def _pieces(self, which: Which, states: Collection[JobState]) -> Iterator[tuple[_Where, _Where]]:
        """Yield conditions for some of the jobs at a time, and for their batch, where jobs are in those states.

        One statement over a million jobs would lock rows for many seconds, and renders whose leases can't be renewed
        meanwhile are stopped. The jobs are divided by position and not by state, so that a job that changes its state
        meanwhile is not missed.
        """
        if which.job_id is not None:
            yield which.jobs, which.batches
            return
        some = (
            sa.select(sa.func.sum(JobCountRow.n))
            .where(JobCountRow.batch_id == BatchRow.id, JobCountRow.state.in_(states))
            .correlate(BatchRow)
            .scalar_subquery()
        )
        query = sa.select(BatchRow.id, BatchRow.total, some.label("some")).where(VISIBLE, which.batches, some > 0)
        with self._db.read() as session:
            batches = session.execute(query).all()
        rest = 0.0
        for batch in batches:
            jobs = JobRow.batch_id == batch.id
            parts: list[_Where] = [
                JobRow.position.between(after + 1, after + _PIECE)
                for after in range(0, batch.total, _PIECE)
                if batch.some > _PIECE
            ]
            for part in parts or [sa.true()]:
                time.sleep(rest)
                rest = _REST_SECONDS
                yield sa.and_(jobs, part), BatchRow.id == batch.id


def _active(session: Session, which: Which) -> int:
    query = sa.select(sa.func.count()).select_from(JobRow).where(which.jobs, JobRow.state.in_(ACTIVE))
    return session.scalar(query) or 0


# One statement for all active states: between two statements, a job could change its state and be missed.
_CANCEL = Move(
    {
        JobState.PENDING: JobState.CANCELLED,
        JobState.QUEUED: JobState.CANCELLED,
        JobState.RUNNING: JobState.RUNNING,
    },
    cancel_requested=True,
)
_RETRY = Move(
    {JobState.FAILED: JobState.PENDING},
    tries=0,
    lost_leases=0,
    error=None,
    not_before=None,
    avoid_worker=None,
    # Its object may be about to be deleted; the rest is swept when the job has ended again.
    checkpoint_key=None,
    leftovers=True,
)

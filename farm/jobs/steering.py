"""`Steering`: what people do with what they have handed in: cancel, pause, resume, try anew.

Each takes a batch, a job, or an owner, who is all batches of that name: those to come are paused too, and those that
are being handed in meanwhile are not cancelled.
"""

import logging
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.jobs.attempts import Attempts
from farm.jobs.database import now
from farm.jobs.queries import VISIBLE, in_state
from farm.jobs.schema import BatchRow, JobCountRow, JobRow
from farm.jobs.states import ACTIVE, JobState

log = logging.getLogger(__name__)

_Where = sa.ColumnElement[bool]

_PIECE = 2000
"""How many jobs a transaction changes: some 40 ms, for which workers that renew their leases may wait."""
_REST_SECONDS = 0.02
"""And how long others may write before the next piece: SQLite has one writer."""


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
    def jobs(self) -> _Where:
        """That a job is one of them."""
        if self.owner is not None:
            return JobRow.batch_id.in_(sa.select(BatchRow.id).where(BatchRow.owner == self.owner))
        return JobRow.batch_id == self.batch_id if self.batch_id is not None else JobRow.id == self.job_id

    @property
    def batches(self) -> _Where:
        """That a batch has some of them."""
        if self.owner is not None:
            return BatchRow.owner == self.owner
        of_job = sa.select(JobRow.batch_id).where(JobRow.id == self.job_id).scalar_subquery()
        return BatchRow.id == (self.batch_id if self.batch_id is not None else of_job)


class Steering(Attempts):
    """Jobs as people steer them."""

    def cancel(self, *, batch_id: str | None = None, job_id: str | None = None, owner: str | None = None) -> int:
        """Cancel what has not ended; returns how many jobs that were.

        What waits is cancelled at once; what runs is marked, and its worker stops it and reports. Of many jobs, some
        thousands at a time: whoever is interrupted repeats it.
        """
        which = Which(batch_id, job_id, owner)
        running = in_state(JobState.RUNNING)
        count = 0
        for jobs, _ in self._pieces(which, ACTIVE):

            def cancel(session: Session, jobs: _Where = jobs) -> int:
                # One statement: between two, a job could step from the state of one into that of the other.
                return _changed(
                    session,
                    jobs,
                    JobRow.state.in_(ACTIVE),
                    cancel_requested=True,
                    state=sa.case((running, JobRow.state), else_=JobState.CANCELLED.value),
                    finished_at=sa.case((running, None), else_=now()),
                )

            count += self._db.written(cancel)
        log.info("cancelled %s jobs=%d", which, count)
        return count

    def pause(self, *, batch_id: str | None = None, job_id: str | None = None, owner: str | None = None) -> int:
        """Let nothing of it be rendered until `resume`; returns how many jobs that holds up now.

        What lies in Redis goes back to the backlog; what runs, its worker hands back after its next step, with its
        state, so that it goes on from there. What has not begun, and what is still to come, waits.
        """
        which = Which(batch_id, job_id, owner)

        def pause(session: Session) -> int:
            self._set_paused(session, which, paused=True)
            queued = in_state(JobState.QUEUED)
            _changed(session, which.jobs, queued, state=JobState.PENDING.value, queued_at=None)
            return _active(session, which)

        count = self._db.written(pause)
        log.info("paused %s jobs=%d", which, count)
        return count

    def resume(self, *, batch_id: str | None = None, job_id: str | None = None, owner: str | None = None) -> int:
        """Let it be rendered again; returns how many of its jobs have not ended.

        Each pause ends by itself: a job of a batch that goes on stays paused if it was paused alone, or its owner is.
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
            _changed(session, which.jobs, JobRow.state.in_(ACTIVE), paused=paused)
        elif which.batch_id is not None:
            session.execute(sa.update(BatchRow).where(BatchRow.id == which.batch_id).values(paused=paused))
        else:
            # The dispatcher may write the first row of an owner at the same time.
            first = "INSERT INTO owners (name, paused) VALUES (:name, :paused) "
            again = "ON CONFLICT (name) DO UPDATE SET paused = excluded.paused"
            session.execute(sa.text(first + again), {"name": which.owner, "paused": paused})

    def retry(self, *, batch_id: str | None = None, job_id: str | None = None, owner: str | None = None) -> int:
        """Give what has failed all its tries anew; returns how many jobs that were.

        The one exception to what has ended never changing. They start afresh; their attempts count on. Of many jobs,
        some thousands at a time, as `cancel` does.
        """
        which = Which(batch_id, job_id, owner)
        count = 0
        for jobs, batch in self._pieces(which, (JobState.FAILED,)):

            def retry(session: Session, jobs: _Where = jobs, batch: _Where = batch) -> int:
                changed = _changed(
                    session,
                    jobs,
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
                if changed:
                    # After the jobs: who notes a batch's end meanwhile has either not seen these, and is put right
                    # here, or waits for this row, and sees them then.
                    session.execute(sa.update(BatchRow).where(batch).values(ended_at=None))
                return changed

            count += self._db.written(retry)
        log.info("to be tried anew %s jobs=%d", which, count)
        return count

    def _pieces(self, which: Which, states: Collection[JobState]) -> Iterator[tuple[_Where, _Where]]:
        """The jobs that are meant, where some are in those states: so many at a time, and the batch that has them.

        A statement over a million jobs would keep those locked that it has come to first, for many seconds: renders
        whose leases can't be renewed meanwhile are stopped. Many jobs are divided by their places and not by their
        states, so that none is left out by stepping from one into another meanwhile.
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
            places: list[_Where] = [
                JobRow.index.between(after + 1, after + _PIECE)
                for after in range(0, batch.total, _PIECE)
                if batch.some > _PIECE
            ]
            for place in places or [sa.true()]:
                time.sleep(rest)
                rest = _REST_SECONDS
                yield sa.and_(jobs, place), BatchRow.id == batch.id


def _changed(session: Session, *where: _Where, **values: Any) -> int:
    changed = session.connection().execute(sa.update(JobRow).where(*where).values(**values))
    return changed.rowcount


def _active(session: Session, which: Which) -> int:
    query = sa.select(sa.func.count()).select_from(JobRow).where(which.jobs, JobRow.state.in_(ACTIVE))
    return session.scalar(query) or 0

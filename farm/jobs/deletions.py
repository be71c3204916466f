"""`Deletions`: deletes batches from SQL.

A deletion has steps, each of which can be repeated. One statement marks the batch, which is then invisible; once none
of its jobs is running, its objects are deleted, and its rows last.
"""

import logging

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.errors import NotEnded, NotFound
from farm.jobs.conditions import ACTIVE_JOBS, in_state, locked_batch
from farm.jobs.database import Database, now, now_plus
from farm.jobs.schema import BatchRow, JobRow
from farm.jobs.states import JobState
from farm.jobs.transitions import Move, finalize

log = logging.getLogger(__name__)

_ROWS = 1000
"""How many jobs a transaction deletes: some 30 ms on SQLite, during which workers wait."""
_ROWS_LOCK = 0x66617265
_DAY_SECONDS = 24 * 3600.0


class Deletions:
    """Marks batches for deletion, cancels their queued and running jobs, and deletes their rows."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def mark(self, batch_id: str, *, cancel: bool = False) -> None:
        """Mark a batch for deletion: it becomes invisible, its jobs are cancelled, and its key is free.

        Raises `NotFound`, and `NotEnded` if it has active jobs, unless `cancel` is set.
        """

        def mark(session: Session) -> int:
            batch = locked_batch(session, batch_id)
            if batch is None:
                raise NotFound(f"there is no batch {batch_id!r}")
            active = session.scalar(sa.select(ACTIVE_JOBS).where(BatchRow.id == batch_id)) or 0
            if active and not cancel:
                raise NotEnded(f"{active} jobs of {batch_id} have not ended: cancel them, or wait for them")
            batch.deleted_at, batch.key = now(), None
            _stop(session, batch_id)
            return active

        active = self._db.written(mark)
        log.info("to be deleted batch_id=%s active=%d", batch_id, active)

    def mark_older_than(self, days: float, limit: int = 100) -> list[str]:
        """Mark batches for deletion that ended so many days ago, the oldest first; returns their ids."""
        old = (
            sa.select(BatchRow.id)
            .where(BatchRow.ended_at < now_plus(sa.literal(-days * _DAY_SECONDS)), BatchRow.deleted_at.is_(None))
            .order_by(BatchRow.ended_at)
            .limit(limit)
        )
        with self._db.write() as session:
            # A batch may be retried while this waits for its row.
            ended = sa.and_(BatchRow.ended_at.is_not(None), BatchRow.deleted_at.is_(None))
            marked = session.scalars(
                sa.update(BatchRow)
                .where(BatchRow.id.in_(old), ended)
                .values(deleted_at=now(), key=None)
                .returning(BatchRow.id)
            ).all()
        for batch_id in marked:
            log.info("to be deleted batch_id=%s: it ended %s days ago", batch_id, days)
        return list(marked)

    def marked(self, limit: int = 20) -> list[str]:
        """Return batches that are marked for deletion, in the order in which they were marked."""
        query = sa.select(BatchRow.id).where(BatchRow.deleted_at.is_not(None)).order_by(BatchRow.deleted_at)
        with self._db.read() as session:
            return list(session.scalars(query.limit(limit)))

    def at_rest(self, batch_id: str) -> bool:
        """Return whether no job of a marked batch is running; cancels running jobs."""

        def at_rest(session: Session) -> bool:
            _stop(session, batch_id)
            running = sa.select(JobRow.id).where(JobRow.batch_id == batch_id, in_state(JobState.RUNNING)).limit(1)
            return session.scalar(running) is None

        return self._db.written(at_rest)

    def delete_rows(self, batch_id: str, after: int = 0) -> int | None:
        """Delete the next rows of a marked batch: its jobs after index `after`, and finally its own row.

        Returns the index to continue after; None when no row is left.
        """
        with self._db.write() as session:
            # Another process may be deleting rows of the batch's jobs, which go before the batch's own row.
            self._db.exclusive(session, _ROWS_LOCK)
            total = session.scalar(
                sa.select(BatchRow.total).where(BatchRow.id == batch_id, BatchRow.deleted_at.is_not(None))
            )
            if total is None:
                return None
            jobs = JobRow.batch_id == batch_id
            if not after:
                first = session.scalar(sa.select(sa.func.min(JobRow.position)).where(jobs))
                after = total if first is None else first - 1
            last = after + _ROWS
            session.execute(sa.delete(JobRow).where(jobs, JobRow.position > after, JobRow.position <= last))
            if last < total:
                return last
            session.execute(sa.delete(BatchRow).where(BatchRow.id == batch_id))
        log.info("deleted batch_id=%s", batch_id)
        return None


def _stop(session: Session, batch_id: str) -> None:
    """Cancel the queued and running jobs of a batch; its pending jobs are no longer dispatched."""
    finalize(session, _STOP, JobRow.batch_id == batch_id)


_STOP = Move({JobState.QUEUED: JobState.CANCELLED, JobState.RUNNING: JobState.RUNNING}, cancel_requested=True)

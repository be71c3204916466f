"""`Endings`: batches that have ended, are given up, and are forgotten.

A batch goes in steps, each of which can be repeated: it is given up in one statement, and from then on not there for
anybody; when none of its jobs is rendered any more, its objects go, and last its rows.
"""

import logging
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.errors import NotEnded, NotFound
from farm.jobs.database import now, now_plus
from farm.jobs.queries import VISIBLE, JobQueries, in_state
from farm.jobs.schema import AttemptRow, BatchRow, JobCountRow, JobRow
from farm.jobs.states import ACTIVE, JobState

log = logging.getLogger(__name__)

_PAGE = 1000
_FORGOTTEN = 1000
"""How many jobs a transaction forgets: some 30 ms on SQLite, where workers wait meanwhile."""
_FORGET_LOCK = 0x66617265
_DAY_SECONDS = 24 * 3600.0

_ACTIVE_JOBS = (
    sa.select(sa.func.coalesce(sa.func.sum(JobCountRow.n), 0))
    .where(JobCountRow.batch_id == BatchRow.id, JobCountRow.state.in_(ACTIVE))
    .correlate(BatchRow)
    .scalar_subquery()
)


class Endings(JobQueries):
    """Batches from the end of their last job on."""

    # --- what has ended -----------------------------------------------------------------------------------------

    def unnoted(self, limit: int = 20) -> list[str]:
        """The batches of which every job has ended, while that is not noted yet; first come first."""
        query = sa.select(BatchRow.id).where(VISIBLE, BatchRow.ended_at.is_(None), _ACTIVE_JOBS == 0)
        with self._db.read() as session:
            return list(session.scalars(query.order_by(BatchRow.accepted_at).limit(limit)))

    def last_ended_at(self, batch_id: str) -> datetime | None:
        """When the last job of a batch ended; None while one has not, or if there is no such batch."""
        with self._db.read() as session:
            return _last_ended_at(session, batch_id)

    def note_end(self, batch_id: str, ended_at: datetime) -> bool:
        """Note that a batch ended then, its manifest being written; False if a job was tried anew since."""
        with self._db.write() as session:
            batch = _locked(session, batch_id)
            if batch is None or _last_ended_at(session, batch_id) != ended_at:
                return False
            batch.ended_at = ended_at
        log.info("ended batch_id=%s", batch_id)
        return True

    def end_is_noted(self, batch_id: str) -> bool:
        """Whether a batch's manifest says how it ended."""
        with self._db.read() as session:
            return session.scalar(sa.select(BatchRow.ended_at).where(BatchRow.id == batch_id)) is not None

    def entries(self, batch_id: str) -> Iterator[dict[str, Any]]:
        """What became of each job of a batch, in order, as its manifest says it: what there is to be said, no more."""
        columns = (
            JobRow.id,
            JobRow.index.label("place"),
            JobRow.state,
            JobRow.spec,
            JobRow.image_key.label("key"),
            JobRow.image_sha256.label("sha256"),
            JobRow.image_bytes.label("bytes"),
            JobRow.width,
            JobRow.height,
            sa.func.coalesce(JobRow.worker, AttemptRow.worker).label("worker"),
            JobRow.model_sha256,
            JobRow.render_seconds.label("seconds"),
            JobRow.error,
            JobRow.reused_from,
        )
        query = (
            sa.select(*columns)
            .outerjoin(AttemptRow, sa.and_(AttemptRow.job_id == JobRow.id, AttemptRow.attempt == JobRow.attempt))
            .where(JobRow.batch_id == batch_id)
            .order_by(JobRow.index)
            .limit(_PAGE)
        )
        after = 0
        while True:
            with self._db.read() as session:
                rows = session.execute(query.where(JobRow.index > after)).mappings().all()
            for row in rows:
                said = {name: value for name, value in row.items() if value is not None}
                yield {"id": said.pop("id"), "index": said.pop("place"), **said}
            if len(rows) < _PAGE:
                return
            after = rows[-1]["place"]

    # --- what is given up ---------------------------------------------------------------------------------------

    def give_up(self, batch_id: str, *, cancel: bool = False) -> None:
        """Give a batch up: from now on it is not there, nothing of it is rendered any more, and its key is free.

        Raises `NotFound`, and `NotEnded` if it has jobs that have not ended, unless they are to be cancelled.
        """

        def give_up(session: Session) -> int:
            batch = _locked(session, batch_id)
            if batch is None:
                raise NotFound(f"there is no batch {batch_id!r}")
            active = session.scalar(sa.select(_ACTIVE_JOBS).where(BatchRow.id == batch_id)) or 0
            if active and not cancel:
                raise NotEnded(f"{active} jobs of {batch_id} have not ended: cancel them, or wait for them")
            batch.deleted_at, batch.key = now(), None
            _stop(session, batch_id)
            return active

        active = self._db.written(give_up)
        log.info("given up batch_id=%s active=%d", batch_id, active)

    def give_up_older_than(self, days: float, limit: int = 100) -> list[str]:
        """Give up batches that ended so many days ago, the oldest first; returns which."""
        old = (
            sa.select(BatchRow.id)
            .where(BatchRow.ended_at < now_plus(sa.literal(-days * _DAY_SECONDS)), BatchRow.deleted_at.is_(None))
            .order_by(BatchRow.ended_at)
            .limit(limit)
        )
        with self._db.write() as session:
            # One of them may be tried anew while this waits for its row.
            ended = sa.and_(BatchRow.ended_at.is_not(None), BatchRow.deleted_at.is_(None))
            given_up = session.scalars(
                sa.update(BatchRow)
                .where(BatchRow.id.in_(old), ended)
                .values(deleted_at=now(), key=None)
                .returning(BatchRow.id)
            ).all()
        for batch_id in given_up:
            log.info("given up batch_id=%s: it ended %s days ago", batch_id, days)
        return list(given_up)

    def given_up(self, limit: int = 20) -> list[str]:
        """The batches that are given up and not forgotten yet."""
        query = sa.select(BatchRow.id).where(BatchRow.deleted_at.is_not(None)).order_by(BatchRow.deleted_at)
        with self._db.read() as session:
            return list(session.scalars(query.limit(limit)))

    def at_rest(self, batch_id: str) -> bool:
        """Whether nothing of a batch that is given up is rendered any more; what is comes to be cancelled."""

        def at_rest(session: Session) -> bool:
            _stop(session, batch_id)
            running = sa.select(JobRow.id).where(JobRow.batch_id == batch_id, in_state(JobState.RUNNING)).limit(1)
            return session.scalar(running) is None

        return self._db.written(at_rest)

    def forget(self, batch_id: str, after: int = 0) -> int | None:
        """Delete the next rows of a batch that is given up, those of jobs first, from the one after that index.

        Returns the index to go on after; None when nothing is left.
        """
        with self._db.write() as session:
            # Whoever deletes a batch's last rows waits for those of its jobs, which another one may be deleting.
            self._db.exclusive(session, _FORGET_LOCK)
            total = session.scalar(
                sa.select(BatchRow.total).where(BatchRow.id == batch_id, BatchRow.deleted_at.is_not(None))
            )
            if total is None:
                return None
            jobs = JobRow.batch_id == batch_id
            if not after:
                first = session.scalar(sa.select(sa.func.min(JobRow.index)).where(jobs))
                after = total if first is None else first - 1
            last = after + _FORGOTTEN
            session.execute(sa.delete(JobRow).where(jobs, JobRow.index > after, JobRow.index <= last))
            if last < total:
                return last
            session.execute(sa.delete(BatchRow).where(BatchRow.id == batch_id))
        log.info("forgotten batch_id=%s", batch_id)
        return None


def _locked(session: Session, batch_id: str) -> BatchRow | None:
    """A batch that is there; whoever else changes it waits, and what this transaction reads next is the latest."""
    found = session.get(BatchRow, batch_id, with_for_update={"key_share": True})
    return None if found is None or found.accepted_at is None or found.deleted_at is not None else found


def _last_ended_at(session: Session, batch_id: str) -> datetime | None:
    if session.scalar(sa.select(_ACTIVE_JOBS).where(BatchRow.id == batch_id)):
        return None
    return session.scalar(sa.select(sa.func.max(JobRow.finished_at)).where(JobRow.batch_id == batch_id))


def _stop(session: Session, batch_id: str) -> None:
    """Cancel what of a batch is in Redis or rendered: what waits in SQL is not dispatched any more."""
    running = in_state(JobState.RUNNING)
    session.connection().execute(
        sa.update(JobRow)
        .where(JobRow.batch_id == batch_id, JobRow.state.in_((JobState.QUEUED, JobState.RUNNING)))
        .values(
            cancel_requested=True,
            state=sa.case((running, JobRow.state), else_=JobState.CANCELLED.value),
            finished_at=sa.case((running, None), else_=now()),
        )
    )

"""`Queries`: reads batches and jobs."""

from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session, selectinload

from farm.errors import ErrorClass, NotFound
from farm.jobs.artifacts import job_info
from farm.jobs.conditions import BATCH_PAUSED, VISIBLE, in_state
from farm.jobs.database import Database
from farm.jobs.records import AttemptInfo, BatchStatus, JobInfo
from farm.jobs.schema import AttemptRow, BatchRow, JobCountRow, JobRow
from farm.jobs.states import ACTIVE, JobState, Outcome


class Queries:
    """Reads batches and jobs; every method reads one snapshot."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def batch(self, name_or_id: str) -> BatchStatus:
        """Return a batch by its id, or the newest batch of that name; raises `NotFound`."""
        with self._db.read() as session:
            by_id = session.execute(_BATCHES.where(BatchRow.id == name_or_id)).one_or_none()
            newest = _BATCHES.where(BatchRow.name == name_or_id).order_by(BatchRow.created_at.desc()).limit(1)
            found = by_id or session.execute(newest).one_or_none()
            if found is None:
                raise NotFound(f"there is no batch {name_or_id!r}; `farm status` lists them")
            row, paused = found
            return _status(session, row, paused=paused)

    def batches(self, limit: int = 20, *, active_only: bool = False) -> list[BatchStatus]:
        """Return the newest batches, newest first."""
        query = _BATCHES.order_by(BatchRow.created_at.desc(), BatchRow.id).limit(limit)
        if active_only:
            query = query.where(
                sa.exists().where(JobRow.batch_id == BatchRow.id, JobRow.state.in_(ACTIVE)).correlate(BatchRow)
            )
        with self._db.read() as session:
            return [_status(session, row, paused=paused) for row, paused in session.execute(query).all()]

    def job(self, job_id: str) -> JobInfo:
        """Return a job by its id; raises `NotFound`."""
        with self._db.read() as session:
            row = session.get(JobRow, job_id, options=[WITH_ARTIFACTS])
            if row is None or session.get_one(BatchRow, row.batch_id).deleted_at is not None:
                raise NotFound(f"there is no job {job_id!r}")
            return job_info(row)

    def jobs(
        self, batch_id: str, *, after: int = 0, limit: int = 1000, states: Sequence[JobState] = ()
    ) -> list[JobInfo]:
        """Return a batch's jobs in order, after index `after`."""
        query = JOBS.where(JobRow.batch_id == batch_id, JobRow.position > after)
        if states:
            query = query.where(JobRow.state.in_(states))
        with self._db.read() as session:
            return [job_info(row) for row in session.scalars(query.order_by(JobRow.position).limit(limit))]

    def wrong(self, batch_id: str, limit: int = 20) -> list[JobInfo]:
        """Return a batch's first jobs with an error: those that failed, and those whose last try failed."""
        query = JOBS.where(JobRow.batch_id == batch_id, JobRow.error.is_not(None))
        with self._db.read() as session:
            return [job_info(row) for row in session.scalars(query.order_by(JobRow.position).limit(limit))]

    def finished(self, batch_id: str, after: JobInfo | None = None, limit: int = 1000) -> list[JobInfo]:
        """Return a batch's ended jobs, in the order in which they ended, after the job `after`."""
        query = JOBS.where(JobRow.batch_id == batch_id, JobRow.finished_at.is_not(None))
        if after is not None and after.finished_at is not None:
            query = query.where(
                JobRow.finished_at >= after.finished_at,
                sa.or_(JobRow.finished_at > after.finished_at, JobRow.position > after.index),
            )
        with self._db.read() as session:
            rows = session.scalars(query.order_by(JobRow.finished_at, JobRow.position).limit(limit))
            return [job_info(row) for row in rows]

    def running(self, batch_id: str, limit: int = 1000) -> list[JobInfo]:
        """Return the jobs of a batch that are running."""
        # Unordered: to order them, SQLite would read the whole batch.
        query = JOBS.where(JobRow.batch_id == batch_id, in_state(JobState.RUNNING)).limit(limit)
        with self._db.read() as session:
            return [job_info(row) for row in session.scalars(query)]

    def attempts(self, job_id: str) -> list[AttemptInfo]:
        """Return the attempts of a job that have ended, in order; the current one is part of the job itself."""
        query = sa.select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.attempt)
        with self._db.read() as session:
            return [
                AttemptInfo(
                    attempt=row.attempt,
                    worker=row.worker,
                    started_at=row.started_at,
                    ended_at=row.ended_at,
                    outcome=Outcome(row.outcome),
                    error_class=ErrorClass(row.error_class) if row.error_class else None,
                    reason=row.reason,
                    steps_done=row.steps_done,
                    device_seconds=row.device_seconds,
                )
                for row in session.scalars(query)
            ]


WITH_ARTIFACTS = selectinload(JobRow.artifacts)
JOBS = sa.select(JobRow).options(WITH_ARTIFACTS)
"""Jobs as `job_info` reads them."""
_BATCHES = sa.select(BatchRow, BATCH_PAUSED.label("paused")).where(VISIBLE)


def _status(session: Session, row: BatchRow, *, paused: bool) -> BatchStatus:
    # Triggers count the jobs as they move: this reads a few rows, however many jobs the batch has.
    found = session.execute(
        sa.select(JobCountRow.state, sa.func.sum(JobCountRow.n))
        .where(JobCountRow.batch_id == row.id)
        .group_by(JobCountRow.state)
    )
    return batch_status(session, row, {JobState(state): int(n) for state, n in found}, paused=paused)


def batch_status(session: Session, row: BatchRow, counts: Mapping[JobState, int], *, paused: bool) -> BatchStatus:
    """Return a batch's row and the number of its jobs in each state as plain data."""
    ended = None
    if not any(counts.get(state) for state in ACTIVE):
        ended = session.scalar(sa.select(sa.func.max(JobRow.finished_at)).where(JobRow.batch_id == row.id))
    return BatchStatus(
        id=row.id,
        name=row.name,
        owner=row.owner,
        priority=row.priority,
        total=row.total,
        created_at=row.created_at,
        counts={state: counts.get(state, 0) for state in JobState},
        finished_at=ended,
        paused=paused,
    )

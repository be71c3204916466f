"""`JobQueries`: what can be asked about batches, jobs and workers; nothing here changes any."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.errors import NotFound
from farm.jobs.database import Database, now_plus
from farm.jobs.memory_limits import Limits, allowed, memory_limits
from farm.jobs.records import BatchStatus, JobInfo, WorkerInfo, job_info, worker_info
from farm.jobs.schema import BatchRow, JobCountRow, JobRow, OwnerRow, WorkerRow
from farm.jobs.served_models import MemoryLimit, served_models
from farm.jobs.states import ACTIVE, JobState
from farm.settings import Settings
from farm.specs.object_keys import checkpoint_key, image_key, preview_key, trajectory_keys

STALE = (JobRow.checkpoint_key.is_not(None), JobRow.finished_at.is_not(None))
"""That a job has ended and may have left objects beside its picture."""

ACCEPTED = BatchRow.accepted_at.is_not(None)
"""That a batch is there as a whole: until then nobody but its writer sees it."""

VISIBLE = sa.and_(ACCEPTED, BatchRow.deleted_at.is_(None))
"""That a batch is there, for anybody."""


class JobQueries:
    """Batches, jobs and workers as SQL has them now; every method is one snapshot."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._lease_seconds = settings.lease_seconds

    def batch(self, name_or_id: str) -> BatchStatus:
        """A batch by its id, or the newest of that name; raises `NotFound`."""
        with self._db.read() as session:
            row = (
                session.get(BatchRow, name_or_id)
                or session.scalars(
                    sa.select(BatchRow)
                    .where(BatchRow.name == name_or_id, VISIBLE)
                    .order_by(BatchRow.created_at.desc())
                    .limit(1)
                ).one_or_none()
            )
            if row is None or row.accepted_at is None or row.deleted_at is not None:
                raise NotFound(f"there is no batch {name_or_id!r}; `farm status` lists them")
            return self._status(session, row)

    def batches(self, limit: int = 20, *, active_only: bool = False) -> list[BatchStatus]:
        """The newest batches, newest first."""
        query = sa.select(BatchRow).where(VISIBLE).order_by(BatchRow.created_at.desc(), BatchRow.id).limit(limit)
        if active_only:
            query = query.where(
                sa.exists().where(JobRow.batch_id == BatchRow.id, JobRow.state.in_(ACTIVE)).correlate(BatchRow)
            )
        with self._db.read() as session:
            return [self._status(session, row) for row in session.scalars(query).all()]

    def _status(self, session: Session, row: BatchRow) -> BatchStatus:
        # Counted as they move, by triggers: however many jobs it has, this reads a few rows.
        found = session.execute(
            sa.select(JobCountRow.state, sa.func.sum(JobCountRow.n))
            .where(JobCountRow.batch_id == row.id)
            .group_by(JobCountRow.state)
        ).all()
        paused = session.scalar(sa.select(OwnerRow.paused).where(OwnerRow.name == row.owner))
        return self._told(session, row, {JobState(state): int(n) for state, n in found}, bool(paused))

    def _told(self, session: Session, row: BatchRow, counts: Mapping[JobState, int], owner_paused: bool) -> BatchStatus:
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
            paused=row.paused or owner_paused,
        )

    def job(self, job_id: str) -> JobInfo:
        """A job by its id; raises `NotFound`."""
        with self._db.read() as session:
            row = session.get(JobRow, job_id)
            if row is None or session.get_one(BatchRow, row.batch_id).deleted_at is not None:
                raise NotFound(f"there is no job {job_id!r}")
            return job_info(row)

    def jobs(
        self, batch_id: str, *, after: int = 0, limit: int = 1000, states: Sequence[JobState] = ()
    ) -> list[JobInfo]:
        """A batch's jobs in their order, from the one after that index."""
        query = sa.select(JobRow).where(JobRow.batch_id == batch_id, JobRow.index > after)
        if states:
            query = query.where(JobRow.state.in_(states))
        with self._db.read() as session:
            return [job_info(row) for row in session.scalars(query.order_by(JobRow.index).limit(limit))]

    def wrong(self, batch_id: str, limit: int = 20) -> list[JobInfo]:
        """A batch's first jobs with an error: those that failed, and those whose last try did."""
        query = sa.select(JobRow).where(JobRow.batch_id == batch_id, JobRow.error.is_not(None))
        with self._db.read() as session:
            return [job_info(row) for row in session.scalars(query.order_by(JobRow.index).limit(limit))]

    def finished(self, batch_id: str, after: JobInfo | None = None, limit: int = 1000) -> list[JobInfo]:
        """A batch's jobs that have ended, in the order they did, from the one that comes after that one."""
        query = sa.select(JobRow).where(JobRow.batch_id == batch_id, JobRow.finished_at.is_not(None))
        if after is not None and after.finished_at is not None:
            query = query.where(
                JobRow.finished_at >= after.finished_at,
                sa.or_(JobRow.finished_at > after.finished_at, JobRow.index > after.index),
            )
        with self._db.read() as session:
            rows = session.scalars(query.order_by(JobRow.finished_at, JobRow.index).limit(limit))
            return [job_info(row) for row in rows]

    def running(self, batch_id: str, limit: int = 1000) -> list[JobInfo]:
        """The jobs of a batch that render now."""
        # Not in their order: SQLite would look for them along the whole batch.
        query = sa.select(JobRow).where(JobRow.batch_id == batch_id, in_state(JobState.RUNNING)).limit(limit)
        with self._db.read() as session:
            return [job_info(row) for row in session.scalars(query)]

    def workers(self) -> list[WorkerInfo]:
        """Every worker that has not said goodbye, by name."""
        alive = WorkerRow.seen_at > now_plus(sa.literal(-self._lease_seconds))
        with self._db.read() as session:
            return [
                worker_info(row, alive=bool(lives))
                for row, lives in session.execute(sa.select(WorkerRow, alive).order_by(WorkerRow.name))
            ]

    def slots(self) -> dict[str, int]:
        """How many slots the living workers that serve a model have, by model."""
        found: dict[str, int] = {}
        for worker in self.workers():
            for name in {model.name for model in worker.models} if worker.alive else ():
                found[name] = found.get(name, 0) + worker.slots
        return found

    def waiting_by_model(self) -> dict[str, int]:
        """How many jobs of each model wait, in the backlog or in Redis."""
        states = (JobState.PENDING, JobState.QUEUED)
        with self._db.read() as session:
            waiting: dict[str, int] = {}
            for state in states:
                for model, count in session.execute(
                    sa.select(JobRow.model, sa.func.count())
                    .join(BatchRow)
                    .where(in_state(state), VISIBLE)
                    .group_by(JobRow.model)
                ):
                    waiting[model] = waiting.get(model, 0) + count
            return waiting

    def unheld(self, batch_id: str | None = None) -> list[str]:
        """The models that jobs, or a batch's jobs, wait for and that no living worker holds."""
        held = self.slots()
        with self._db.read() as session:
            missing = {
                model
                for state in (JobState.PENDING, JobState.QUEUED)
                for model in models_in(session, state)
                if model not in held and _has(session, state, model, batch_id)
            }
        return sorted(missing)

    def memory_limits(self, session: Session) -> Limits:
        """The limits of what any living worker may have the memory for, by model."""
        alive = WorkerRow.seen_at > now_plus(sa.literal(-self._lease_seconds))
        return memory_limits(map(served_models, session.scalars(sa.select(WorkerRow.models).where(alive))))

    def too_large(self, batch_id: str | None = None) -> dict[str, MemoryLimit]:
        """The models with jobs, in a batch or at all, that wait because no living worker has the memory for them.

        With the highest limit of a worker of that model.
        """
        with self._db.read() as session:
            return {
                model: max(limits, key=lambda limit: limit.pixels)
                for model, limits in self.memory_limits(session).items()
                if _has(session, JobState.PENDING, model, batch_id, ~allowed(limits))
            }

    def queued_models(self) -> list[str]:
        """The models that have queued jobs."""
        with self._db.read() as session:
            return list(models_in(session, JobState.QUEUED))

    def queued(self, model: str) -> list[str]:
        """The ids of a model's queued jobs; at most a window of them."""
        with self._db.read() as session:
            return list(session.scalars(sa.select(JobRow.id).where(in_state(JobState.QUEUED), JobRow.model == model)))

    def leftovers(self, limit: int = 100, settled_seconds: float = 0.0) -> list[tuple[str, list[str]]]:
        """Jobs that ended and may have left objects beside their picture, and the keys of these, first ended first.

        Those that ended less than `settled_seconds` ago are left out: something of them may still be on its way.
        Whichever of its attempts was lost can have left its state, a preview, or a picture that nobody recorded.
        """
        columns = JobRow.id, JobRow.batch_id, JobRow.index.label("place"), JobRow.attempt, JobRow.spec, JobRow.image_key
        settled = JobRow.finished_at <= now_plus(sa.literal(-settled_seconds))
        query = sa.select(*columns).where(*STALE, settled).order_by(JobRow.finished_at).limit(limit)
        with self._db.read() as session:
            rows = session.execute(query).all()
        return [(row.id, list(_beside_the_picture(row))) for row in rows]


def _beside_the_picture(job: sa.Row[Any]) -> Iterator[str]:
    for attempt in range(1, job.attempt + 1):
        yield checkpoint_key(job.batch_id, job.place, attempt)
        yield preview_key(job.batch_id, job.place, attempt)
        picture = image_key(job.batch_id, job.place, attempt, job.spec["prompt"])
        if picture != job.image_key:
            yield from (picture, *trajectory_keys(picture))


def in_state(state: JobState) -> sa.ColumnElement[bool]:
    """That a job is in a state, in a form that the state's partial index serves."""
    # A literal, not a parameter: neither database uses a partial index for a value it can't see when it plans.
    return JobRow.state == sa.literal_column(f"'{state.value}'")


def _has(session: Session, state: JobState, model: str, batch_id: str | None, *which: sa.ColumnElement[bool]) -> bool:
    query = sa.select(JobRow.batch_id).join(BatchRow).where(in_state(state), JobRow.model == model, VISIBLE, *which)
    if batch_id is not None:
        query = query.where(JobRow.batch_id == batch_id)
    return session.scalar(query.limit(1)) is not None


def models_in(session: Session, state: JobState) -> Iterator[str]:
    """The models that have jobs in a state."""
    # From one model to the next over the partial index: as many look-ups as models, however many jobs there are.
    last = ""
    while True:
        found = session.scalar(
            sa.select(JobRow.model).where(in_state(state), JobRow.model > last).order_by(JobRow.model).limit(1)
        )
        if found is None:
            return
        yield found
        last = found

"""`Overview`: queries for dashboards; their cost depends on the activity, not on the number of jobs."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.jobs.artifacts import job_info
from farm.jobs.conditions import BATCH_PAUSED, VISIBLE, in_state, models_in, waiting_by_model
from farm.jobs.database import Database, now, now_plus
from farm.jobs.memory_limits import allowed, memory_limits
from farm.jobs.queries import JOBS, batch_status
from farm.jobs.records import BatchStatus, JobInfo
from farm.jobs.schema import BatchRow, JobCountRow, JobRow
from farm.jobs.served_models import MemoryLimit
from farm.jobs.states import JobState
from farm.jobs.tempo import MOST_ENDINGS, Tempo, tempo
from farm.jobs.workers import live_models
from farm.settings import Settings

_FIRST_JOBS = 100
_RUNNING = 256
_LAST_ENDED = 1000


@dataclass(frozen=True)
class Load:
    """The current load of a worker."""

    renders: int
    """The number of jobs that it has claimed."""
    seconds_per_step: float | None
    """The mean over these jobs."""


@dataclass(frozen=True)
class Totals:
    """Totals over all jobs of a batch."""

    began_at: datetime | None
    """The earliest start among the latest attempts of its jobs."""
    device_seconds: float | None
    models: Sequence[tuple[str, str]]
    """Name and SHA-256 of each model that rendered its pictures."""


class Overview:
    """Reads the batches in progress, their speed, and the models and jobs that no live worker can serve."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._lease_seconds = settings.lease_seconds

    def open_batches(self, limit: int, after: tuple[datetime, str] | None = None) -> list[tuple[datetime, str]]:
        """Return the batches that have not ended, as time of acceptance and id, in that order, after the entry `after`.

        A batch that has ended is included until its manifest is written.
        """
        query = sa.select(BatchRow.accepted_at, BatchRow.id).where(VISIBLE, BatchRow.ended_at.is_(None))
        if after is not None:
            query = query.where(
                BatchRow.accepted_at >= after[0],
                sa.or_(BatchRow.accepted_at > after[0], BatchRow.id > after[1]),
            )
        with self._db.read() as session:
            rows = session.execute(query.order_by(BatchRow.accepted_at, BatchRow.id).limit(limit))
            return [(accepted_at, batch_id) for accepted_at, batch_id in rows if accepted_at is not None]

    def moving(self, limit: int) -> list[str]:
        """Return the batches with queued or running jobs."""
        with self._db.read() as session:
            found: dict[str, None] = {}
            for state in (JobState.RUNNING, JobState.QUEUED):
                query = sa.select(JobRow.batch_id).join(BatchRow).where(in_state(state), VISIBLE).distinct()
                found.update(dict.fromkeys(session.scalars(query.limit(limit))))
        return list(found)[:limit]

    def just_ended(self, seconds: float, limit: int) -> list[str]:
        """Return the batches that ended in the last `seconds`, newest first."""
        query = sa.select(BatchRow.id).where(
            VISIBLE, BatchRow.ended_at.is_not(None), BatchRow.ended_at > now_plus(sa.literal(-seconds))
        )
        with self._db.read() as session:
            return list(session.scalars(query.order_by(BatchRow.ended_at.desc()).limit(limit)))

    def statuses(self, batch_ids: Sequence[str]) -> dict[str, BatchStatus]:
        """Return the progress of these batches, by id; deleted batches are left out."""
        with self._db.read() as session:
            rows = session.execute(
                sa.select(BatchRow, BATCH_PAUSED.label("paused")).where(BatchRow.id.in_(batch_ids), VISIBLE)
            ).all()
            counts: dict[str, dict[JobState, int]] = {}
            for batch_id, state, count in session.execute(
                sa.select(JobCountRow.batch_id, JobCountRow.state, sa.func.sum(JobCountRow.n))
                .where(JobCountRow.batch_id.in_(batch_ids))
                .group_by(JobCountRow.batch_id, JobCountRow.state)
            ):
                counts.setdefault(batch_id, {})[JobState(state)] = int(count)
            return {row.id: batch_status(session, row, counts.get(row.id, {}), paused=paused) for row, paused in rows}

    def tempo(self, batch: BatchStatus) -> Tempo:
        """Return the speed of a batch: from its last endings, or, before its second, from its running jobs' steps."""
        if batch.done:
            return Tempo()
        last = (
            sa.select(JobRow.finished_at)
            .where(JobRow.batch_id == batch.id, JobRow.finished_at.is_not(None))
            .order_by(JobRow.finished_at.desc())
            .limit(MOST_ENDINGS)
        )
        with self._db.read() as session:
            endings = [moment for moment in session.scalars(last) if moment is not None]
            paces = [] if len(endings) > 1 else self._paces(session, batch.id)
            moment: Any = session.scalar(sa.select(now()))
        return tempo(batch.total - batch.ended, endings, moment, paces, paused=batch.paused)

    def _paces(self, session: Session, batch_id: str) -> list[float]:
        steps = JobRow.spec["num_inference_steps"].as_integer()
        rows = session.execute(
            sa.select(JobRow.seconds_per_step, steps)
            .where(JobRow.batch_id == batch_id, in_state(JobState.RUNNING), JobRow.seconds_per_step > 0)
            .limit(_RUNNING)
        )
        return [1 / (seconds * count) for seconds, count in rows if seconds and count]

    def models_of(self, batch_id: str) -> list[str]:
        """Return the models of a batch: of its first hundred jobs, and of all its pending jobs."""
        first = sa.select(JobRow.model).where(JobRow.batch_id == batch_id, JobRow.position <= _FIRST_JOBS).distinct()
        with self._db.read() as session:
            found = set(session.scalars(first))
            for model in models_in(session, JobState.PENDING):
                waits = in_state(JobState.PENDING), JobRow.model == model, JobRow.batch_id == batch_id
                if model not in found and session.scalar(sa.select(JobRow.id).where(*waits).limit(1)):
                    found.add(model)
        return sorted(found)

    def loads(self) -> dict[str, Load]:
        """Return the current load of each worker that has claimed jobs, by name."""
        query = (
            sa.select(JobRow.worker, sa.func.count(), sa.func.avg(JobRow.seconds_per_step))
            .where(in_state(JobState.RUNNING), JobRow.worker.is_not(None))
            .group_by(JobRow.worker)
        )
        with self._db.read() as session:
            return {str(worker): Load(renders, seconds) for worker, renders, seconds in session.execute(query)}

    def failed(self, batch_id: str, limit: int = 10) -> list[JobInfo]:
        """A batch's jobs that failed last, newest first, of the last thousand that ended."""
        last = (
            sa.select(JobRow.id)
            .where(JobRow.batch_id == batch_id, JobRow.finished_at.is_not(None))
            .order_by(JobRow.finished_at.desc())
            .limit(_LAST_ENDED)
        )
        query = (
            JOBS.where(JobRow.id.in_(last), JobRow.state == JobState.FAILED.value)
            .order_by(JobRow.finished_at.desc())
            .limit(limit)
        )
        with self._db.read() as session:
            return [job_info(row) for row in session.scalars(query)]

    def totals(self, batch_id: str) -> Totals:
        """Return the totals of a batch; reads each of its jobs once."""
        jobs = JobRow.batch_id == batch_id
        made_by = sa.select(JobRow.model, JobRow.model_sha256).where(jobs, JobRow.model_sha256.is_not(None)).distinct()
        sums = sa.select(sa.func.min(JobRow.started_at), sa.func.sum(JobRow.device_seconds)).where(jobs)
        with self._db.read() as session:
            began_at, device_seconds = session.execute(sums).one()
            models = sorted((model, str(sha256)) for model, sha256 in session.execute(made_by))
        return Totals(began_at, device_seconds, models)

    def waiting_by_model(self) -> dict[str, int]:
        """Return the number of waiting jobs by model, in the backlog and in Redis."""
        with self._db.read() as session:
            return waiting_by_model(session)

    def unheld(self, batch_id: str | None = None) -> list[str]:
        """Return the models that jobs of a batch, or of all, wait for and that no live worker serves."""
        with self._db.read() as session:
            held = {model.name for models in live_models(session, self._lease_seconds) for model in models}
            missing = {
                model
                for state in (JobState.PENDING, JobState.QUEUED)
                for model in models_in(session, state)
                if model not in held and _has(session, state, model, batch_id)
            }
        return sorted(missing)

    def too_large(self, batch_id: str | None = None) -> dict[str, MemoryLimit]:
        """Return the models with jobs, of a batch or of all, that no live worker has the memory for.

        With the highest limit of a worker of that model.
        """
        with self._db.read() as session:
            return {
                model: max(limits, key=lambda limit: limit.pixels)
                for model, limits in memory_limits(live_models(session, self._lease_seconds)).items()
                if _has(session, JobState.PENDING, model, batch_id, ~allowed(limits))
            }


def _has(session: Session, state: JobState, model: str, batch_id: str | None, *which: sa.ColumnElement[bool]) -> bool:
    query = sa.select(JobRow.batch_id).join(BatchRow).where(in_state(state), JobRow.model == model, VISIBLE, *which)
    if batch_id is not None:
        query = query.where(JobRow.batch_id == batch_id)
    return session.scalar(query.limit(1)) is not None

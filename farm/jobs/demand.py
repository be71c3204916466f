"""The demand for each model: its waiting and running jobs, and the device seconds that they will take.

The cost depends on the number of batches with active jobs, not on the number of jobs: pending jobs are already counted
per batch. `infra/keda/device_seconds.sql` is the same for one model, in plain SQL for an autoscaler.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.jobs.conditions import BATCH_PAUSED, VISIBLE, in_state, models_in
from farm.jobs.costs import batch_seconds, model_seconds
from farm.jobs.database import Database, now
from farm.jobs.schema import BatchRow, JobCountRow, JobRow, WorkerRow
from farm.jobs.served_models import served_models
from farm.jobs.states import JobState
from farm.jobs.waiting import batches_waiting
from farm.jobs.workers import alive

_CHUNK = 500


@dataclass
class Demand:
    """The demand for one model, and the capacity that serves it."""

    jobs: Counter[JobState] = field(default_factory=Counter)
    """Pending, queued and running."""
    held_up: int = 0
    """How many of these are held up: their batch or its owner is paused."""
    queued_seconds: float = 0.0
    """The expected device seconds of the waiting jobs that are not held up."""
    running_seconds: float = 0.0
    """The expected device seconds of the running jobs, from the first step to the last."""
    waits_since: datetime | None = None
    """When the oldest batch with waiting jobs that are not held up was accepted."""
    workers: int = 0
    """The live workers that serve it."""
    slots: int = 0


@dataclass(frozen=True)
class Demands:
    """The demand for all models at one time."""

    jobs: Mapping[JobState, int]
    """The jobs of all batches, by state."""
    models: Mapping[str, Demand]
    """Every model that a live worker serves or that has active jobs."""
    workers: int
    """The number of live workers."""
    asked_at: datetime
    """The time of the query, by the database's clock."""


def demands(db: Database, lease_seconds: float) -> Demands:
    """Return the current demand."""
    models: defaultdict[str, Demand] = defaultdict(Demand)
    with db.read() as session:
        asked_at: Any = session.scalar(sa.select(now()))
        rows = session.execute(
            sa.select(JobCountRow.state, sa.func.sum(JobCountRow.n))
            .join(BatchRow, BatchRow.id == JobCountRow.batch_id)
            .where(VISIBLE)
            .group_by(JobCountRow.state)
        )
        jobs = {JobState(state): int(count) for state, count in rows}
        living = session.execute(sa.select(WorkerRow.slots, WorkerRow.models).where(alive(lease_seconds))).all()
        for slots, served in living:
            for name in {model.name for model in served_models(served)}:
                models[name].workers += 1
                models[name].slots += slots
        _add_waiting(session, models)
        _add_in_flight(session, models)
    return Demands({state: jobs.get(state, 0) for state in JobState}, dict(models), len(living), asked_at)


def _add_waiting(session: Session, models: Mapping[str, Demand]) -> None:
    lines = {model: session.execute(_line(model)).all() for model in models_in(session, JobState.PENDING)}
    of_models = Counter(row.id for line in lines.values() for row in line)
    whole = _counted(session, list(of_models))
    for model, line in lines.items():
        demand = models[model]
        usual = model_seconds(session, model) if any(row.seconds is None for row in line) else 0.0
        for row in line:
            count = whole[row.id] if of_models[row.id] == 1 else _count(session, model, row.id)
            demand.jobs[JobState.PENDING] += count
            if row.held_up:
                demand.held_up += count
                continue
            demand.queued_seconds += count * (usual if row.seconds is None else row.seconds)
            demand.waits_since = min(filter(None, (demand.waits_since, row.accepted_at)))


def _add_in_flight(session: Session, models: Mapping[str, Demand]) -> None:
    usual: dict[str, float] = {}
    for state in (JobState.QUEUED, JobState.RUNNING):
        found = (
            sa.select(JobRow.model, JobRow.batch_id, sa.func.count().label("jobs"))
            .where(in_state(state))
            .group_by(JobRow.model, JobRow.batch_id)
            .subquery()
        )
        rows = session.execute(
            sa.select(found.c.model, found.c.jobs, BatchRow.accepted_at, batch_seconds(found.c.model).label("seconds"))
            .join(found, found.c.batch_id == BatchRow.id)
            .where(VISIBLE)
        ).all()
        for row in rows:
            demand, seconds = models[row.model], row.seconds
            demand.jobs[state] += row.jobs
            if seconds is None:
                if row.model not in usual:
                    usual[row.model] = model_seconds(session, row.model)
                seconds = usual[row.model]
            if state is JobState.RUNNING:
                demand.running_seconds += row.jobs * seconds
            else:
                demand.queued_seconds += row.jobs * seconds
                demand.waits_since = min(filter(None, (demand.waits_since, row.accepted_at)))


def _line(model: str) -> sa.Select[*tuple[Any, ...]]:
    waiting = batches_waiting(model)
    return (
        sa.select(
            BatchRow.id,
            BatchRow.accepted_at,
            BATCH_PAUSED.label("held_up"),
            batch_seconds(sa.literal(model)).label("seconds"),
        )
        .join(waiting, waiting.c.batch_id == BatchRow.id)
        .where(VISIBLE)
    )


def _counted(session: Session, batch_ids: Sequence[str]) -> dict[str, int]:
    """The number of pending jobs of each of these batches."""
    found: dict[str, int] = {}
    for start in range(0, len(batch_ids), _CHUNK):
        some = batch_ids[start : start + _CHUNK]
        rows = session.execute(
            sa.select(JobCountRow.batch_id, sa.func.sum(JobCountRow.n))
            .where(JobCountRow.batch_id.in_(some), JobCountRow.state == JobState.PENDING.value)
            .group_by(JobCountRow.batch_id)
        )
        found.update({batch_id: int(count) for batch_id, count in rows})
    return found


def _count(session: Session, model: str, batch_id: str) -> int:
    query = sa.select(sa.func.count()).where(
        in_state(JobState.PENDING), JobRow.model == model, JobRow.batch_id == batch_id
    )
    return session.scalar(query) or 0

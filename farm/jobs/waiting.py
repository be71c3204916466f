"""Queries on the backlog: the batches with pending jobs, and the jobs that may be queued next."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from farm.jobs.conditions import BATCH_PAUSED, VISIBLE, in_state
from farm.jobs.database import now
from farm.jobs.memory_limits import allowed
from farm.jobs.schema import BatchRow, JobRow, OwnerRow
from farm.jobs.served_models import MemoryLimit
from farm.jobs.states import JobState


def batches_waiting(model: str) -> sa.CTE:
    """The ids of the batches that have pending jobs of a model: one look-up for each such batch."""
    first = sa.select(sa.func.min(JobRow.batch_id)).where(in_state(JobState.PENDING), JobRow.model == model)
    waiting = sa.select(first.scalar_subquery().label("batch_id")).cte("waiting", recursive=True)
    following = first.where(JobRow.batch_id > waiting.c.batch_id).correlate(waiting)
    return waiting.union_all(sa.select(following.scalar_subquery()).where(waiting.c.batch_id.is_not(None)))


def in_line(model: str) -> sa.Select[*tuple[Any, ...]]:
    """The batches that have pending jobs of a model and may be served, with their owners, in order of submission."""
    waiting = batches_waiting(model)
    finished = sa.select(sa.func.max(JobRow.finished_at)).where(JobRow.batch_id == BatchRow.id).correlate(BatchRow)
    return (
        sa.select(
            BatchRow.id,
            BatchRow.name,
            BatchRow.owner,
            BatchRow.priority,
            BatchRow.total,
            BatchRow.weight,
            BatchRow.virtual_time,
            BatchRow.accepted_at,
            finished.scalar_subquery().label("last_finished_at"),
            now().label("now"),
            OwnerRow.weight.label("owner_weight"),
            OwnerRow.virtual_time.label("owner_virtual_time"),
            OwnerRow.most_queued,
        )
        .join(waiting, waiting.c.batch_id == BatchRow.id)
        .outerjoin(OwnerRow, OwnerRow.name == BatchRow.owner)
        .where(VISIBLE, ~BATCH_PAUSED)
        .order_by(BatchRow.accepted_at, BatchRow.id)
    )


def next_jobs(
    model: str, batch_id: str, count: int, after: int = 0, limits: Sequence[MemoryLimit] = ()
) -> sa.Select[*tuple[Any, ...]]:
    """The next jobs of a batch that may be dispatched, in order, after position `after`.

    `limits` are the memory limits of the live workers; empty if every picture may fit.
    """
    return (
        sa.select(JobRow.id, JobRow.position, JobRow.work_sha256)
        .where(
            in_state(JobState.PENDING),
            JobRow.model == model,
            JobRow.batch_id == batch_id,
            JobRow.position > after,
            sa.or_(JobRow.not_before.is_(None), JobRow.not_before <= now()),
            ~JobRow.paused,
            *((allowed(limits),) if limits else ()),
        )
        .order_by(JobRow.position)
        .limit(count)
    )

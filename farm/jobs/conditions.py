"""SQL conditions on batches and jobs that several modules share: in a state, visible, paused, active."""

from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.jobs.schema import BatchRow, JobCountRow, JobRow, OwnerRow
from farm.jobs.states import ACTIVE, JobState

ACCEPTED = BatchRow.accepted_at.is_not(None)
"""A batch was submitted completely: until then only its submission sees it."""

VISIBLE = sa.and_(ACCEPTED, BatchRow.deleted_at.is_(None))
"""A batch was submitted completely and is not being deleted."""

BATCH_PAUSED = sa.or_(
    BatchRow.paused, sa.exists().where(OwnerRow.name == BatchRow.owner, OwnerRow.paused).correlate(BatchRow)
)
"""A batch, or its owner, is paused."""

JOB_PAUSED = sa.or_(JobRow.paused, sa.exists().where(BatchRow.id == JobRow.batch_id, BATCH_PAUSED).correlate(JobRow))
"""A job, its batch or its owner is paused."""

ACTIVE_JOBS = (
    sa.select(sa.func.coalesce(sa.func.sum(JobCountRow.n), 0))
    .where(JobCountRow.batch_id == BatchRow.id, JobCountRow.state.in_(ACTIVE))
    .correlate(BatchRow)
    .scalar_subquery()
)
"""The number of a batch's jobs that have not ended."""


def in_state(state: JobState) -> sa.ColumnElement[bool]:
    """A job is in a state; the state's partial index can serve this condition."""
    # A literal, not a parameter: neither database uses a partial index for a value that its planner does not see.
    return JobRow.state == sa.literal_column(f"'{state.value}'")


def models_in(session: Session, state: JobState) -> Iterator[str]:
    """Yield the models that have jobs in a state, in order."""
    # A loose index scan: one look-up for each model, however many jobs there are.
    last = ""
    while True:
        found = session.scalar(
            sa.select(JobRow.model).where(in_state(state), JobRow.model > last).order_by(JobRow.model).limit(1)
        )
        if found is None:
            return
        yield found
        last = found


def waiting_by_model(session: Session, *conditions: sa.ColumnElement[bool]) -> dict[str, int]:
    """The number of jobs of each model that wait, in the backlog and in Redis, and meet the conditions."""
    waiting: dict[str, int] = {}
    for state in (JobState.PENDING, JobState.QUEUED):
        rows = session.execute(
            sa.select(JobRow.model, sa.func.count())
            .join(BatchRow)
            .where(in_state(state), VISIBLE, *conditions)
            .group_by(JobRow.model)
        )
        for model, count in rows:
            waiting[model] = waiting.get(model, 0) + count
    return waiting


def locked_batch(session: Session, batch_id: str) -> BatchRow | None:
    """Return a visible batch and lock its row; the transaction's next reads see the latest rows."""
    found = session.get(BatchRow, batch_id, with_for_update={"key_share": True})
    return None if found is None or found.accepted_at is None or found.deleted_at is not None else found

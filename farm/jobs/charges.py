"""Charges: the expected device seconds of dispatched jobs, corrected once the real ones are known.

A job's charge stays in its row until it is corrected, so that it outlives the process that dispatched the job.
"""

from collections import defaultdict
from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.jobs.conditions import in_state
from farm.jobs.costs import SECONDS
from farm.jobs.schema import BatchRow, JobRow, OwnerRow
from farm.jobs.states import JobState

MOST = 500
"""How many charges a transaction corrects."""

# The same text as in the partial index, which both databases must recognize.
CORRECTABLE = sa.text("jobs.charged_seconds IS NOT NULL AND jobs.state NOT IN ('queued', 'running')")
"""A job has a charge, and its real cost is known: it has ended, or went back to the backlog."""

_TOOK = sa.case(
    (sa.or_(in_state(JobState.PENDING), JobRow.reused_from.is_not(None)), 0.0),
    (in_state(JobState.SUCCEEDED), sa.func.coalesce(SECONDS, JobRow.charged_seconds)),
    # The cost of a job without a picture is not measured.
    else_=JobRow.charged_seconds,
)


def correct(session: Session) -> list[tuple[str, str]]:
    """Correct the charges of the next jobs, at most `MOST`; returns the batch and model of each of them.

    Never waits for a row: the charges of locked jobs, batches and owners are left for the next call.
    """
    rows = session.execute(
        sa.select(
            JobRow.id, JobRow.model, JobRow.batch_id, BatchRow.owner, (_TOOK - JobRow.charged_seconds).label("more")
        )
        .join(BatchRow, BatchRow.id == JobRow.batch_id)
        .join(OwnerRow, OwnerRow.name == BatchRow.owner)
        .where(CORRECTABLE)
        .limit(MOST)
        .with_for_update(skip_locked=True, key_share=True)
    ).all()
    if not rows:
        return []
    batches: defaultdict[str, float] = defaultdict(float)
    owners: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        batches[row.batch_id] += row.more
        owners[row.owner] += row.more
    _charge(session, BatchRow, BatchRow.id, batches)
    _charge(session, OwnerRow, OwnerRow.name, owners)
    corrected = sa.update(JobRow).where(JobRow.id.in_([row.id for row in rows])).values(charged_seconds=None)
    session.connection().execute(corrected)
    return [(row.batch_id, row.model) for row in rows]


def _charge(
    session: Session,
    table: type[BatchRow] | type[OwnerRow],
    key: sa.orm.InstrumentedAttribute[str],
    seconds: Mapping[str, float],
) -> None:
    """Add device seconds, by weight, to virtual times, which never become negative."""
    after = table.virtual_time + sa.bindparam("more") / table.weight
    charge = (
        sa.update(table).where(key == sa.bindparam("of")).values(virtual_time=sa.case((after > 0, after), else_=0.0))
    )
    session.connection().execute(charge, [{"of": name, "more": more} for name, more in seconds.items()])

"""The cost of a job: the device seconds of the last jobs of its batch, or of its model."""

from collections.abc import Collection, Iterable

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.jobs.conditions import VISIBLE
from farm.jobs.fair_share import UNKNOWN_SECONDS
from farm.jobs.schema import BatchRow, JobRow

_KEPT = 10_000
LAST_OF_BATCH = 16
"""A batch's cost is the mean of so many of its last jobs."""
LAST_OF_MODEL, NEWEST_BATCHES = 40, 50
"""A model's cost is the mean over so many of the newest batches, of so many of the last jobs of each."""

SECONDS = sa.func.coalesce(JobRow.device_seconds, JobRow.render_seconds)
"""The device seconds of a rendered job; if they were not measured, its render seconds, which are longer."""


def batch_seconds(model: sa.ColumnElement[str], last: int = LAST_OF_BATCH) -> sa.ScalarSelect[float | None]:
    """The mean cost of those of a batch's last jobs that are of a model and were rendered, not copied."""
    jobs = (
        sa.select(JobRow.model, JobRow.reused_from, SECONDS.label("seconds"))
        .where(JobRow.batch_id == BatchRow.id, JobRow.finished_at.is_not(None))
        .order_by(JobRow.finished_at.desc())
        .limit(last)
        .correlate(BatchRow)
        .subquery()
    )
    # The conditions are outside the limit: a batch may have a million jobs of other models, or copies.
    mean = sa.select(sa.func.avg(jobs.c.seconds)).where(jobs.c.model == model, jobs.c.reused_from.is_(None))
    return mean.scalar_subquery()


def model_seconds(session: Session, model: str) -> float:
    """Return the mean cost of a model's jobs lately, in any batch."""
    newest = (
        sa.select(batch_seconds(sa.literal(model), LAST_OF_MODEL).label("seconds"))
        .where(VISIBLE)
        .order_by(BatchRow.created_at.desc())
        .limit(NEWEST_BATCHES)
        .subquery()
    )
    return session.scalar(sa.select(sa.func.avg(newest.c.seconds))) or UNKNOWN_SECONDS


class Costs:
    """The expected costs of jobs: read from SQL once, and again after jobs of the batch have ended."""

    def __init__(self) -> None:
        self._of_batch: dict[tuple[str, str], float | None] = {}
        self._of_model: dict[str, float] = {}

    def seconds(self, session: Session, model: str, batch_ids: Collection[str]) -> dict[str, float]:
        """Return the expected device seconds of a job of that model, by batch."""
        unknown = [batch_id for batch_id in batch_ids if (batch_id, model) not in self._of_batch]
        if unknown:
            if len(self._of_batch) > _KEPT:
                self._of_batch.clear()
                unknown = list(batch_ids)
            query = sa.select(BatchRow.id, batch_seconds(sa.literal(model))).where(BatchRow.id.in_(unknown))
            self._of_batch.update({(batch_id, model): seconds for batch_id, seconds in session.execute(query)})
        found = {batch_id: self._of_batch[batch_id, model] for batch_id in batch_ids}
        if model not in self._of_model and None in found.values():
            self._of_model[model] = model_seconds(session, model)
        return {batch_id: seconds or self._of_model[model] for batch_id, seconds in found.items()}

    def outdated(self, jobs: Iterable[tuple[str, str]]) -> None:
        """Forget the costs of ended jobs, given by batch and model: they are read again."""
        for batch_id, model in jobs:
            self._of_batch.pop((batch_id, model), None)
            self._of_model.pop(model, None)

"""`Leftovers`: the objects that attempts left in the object store beside the picture of a job that has ended."""

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from farm.jobs.database import Database, now_plus
from farm.jobs.schema import JobRow
from farm.specs.object_keys import checkpoint_key, image_key, preview_key, trajectory_keys

# In the same form as in the partial indexes.
STALE: tuple[sa.ColumnElement[Any], ...] = (sa.literal_column("jobs.leftovers"), JobRow.finished_at.is_not(None))
"""A job has ended, and its attempts may have left objects beside its picture."""
STALE_OF_OLD_WORKERS = (JobRow.checkpoint_key.is_not(None), JobRow.finished_at.is_not(None))
"""The same, as workers before release 0.2 note it."""


class Leftovers:
    """Finds leftovers to be swept, and records their deletion."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def find(self, limit: int = 100, settled_seconds: float = 0.0) -> list[tuple[str, list[str]]]:
        """Return jobs that may have left objects, with the keys of these, in the order in which the jobs ended.

        Jobs that ended less than `settled_seconds` ago are left out: their objects may still be uploading. Any lost
        attempt may have left a checkpoint, a preview, or a picture that was never recorded.
        """
        columns = JobRow.id, JobRow.batch_id, JobRow.position, JobRow.attempt, JobRow.spec, JobRow.image_key
        settled = JobRow.finished_at <= now_plus(sa.literal(-settled_seconds))
        query = sa.select(*columns).where(settled).order_by(JobRow.finished_at).limit(limit)
        with self._db.read() as session:
            rows = {
                row.id: row for stale in (STALE, STALE_OF_OLD_WORKERS) for row in session.execute(query.where(*stale))
            }
        return [(job_id, list(_keys(row))) for job_id, row in rows.items()]

    def swept(self, job_ids: Sequence[str]) -> None:
        """Record that the leftovers of these jobs, which have ended, are deleted."""
        with self._db.write() as session:
            session.execute(
                sa.update(JobRow)
                .where(JobRow.id.in_(job_ids), JobRow.finished_at.is_not(None))
                .values(leftovers=False, checkpoint_key=None)
            )


def _keys(job: sa.Row[Any]) -> Iterator[str]:
    for attempt in range(1, job.attempt + 1):
        yield checkpoint_key(job.batch_id, job.position, attempt)
        yield preview_key(job.batch_id, job.position, attempt)
        picture = image_key(job.batch_id, job.position, attempt, job.spec["prompt"])
        if picture != job.image_key:
            yield from (picture, *trajectory_keys(picture))

"""`Endings`: records the ends of batches, and reads the entries of their manifests."""

import logging
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.jobs.conditions import ACTIVE_JOBS, VISIBLE, locked_batch
from farm.jobs.database import Database
from farm.jobs.records import Role
from farm.jobs.schema import ArtifactRow, AttemptRow, BatchRow, JobRow

log = logging.getLogger(__name__)

_PAGE = 1000


class Endings:
    """Records when batches have ended, and reads their manifests' entries."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def unnoted(self, limit: int = 20) -> list[str]:
        """Return the batches whose jobs have all ended and whose end is not noted, in order of submission."""
        query = sa.select(BatchRow.id).where(VISIBLE, BatchRow.ended_at.is_(None), ACTIVE_JOBS == 0)
        with self._db.read() as session:
            return list(session.scalars(query.order_by(BatchRow.accepted_at).limit(limit)))

    def last_ended_at(self, batch_id: str) -> datetime | None:
        """Return when the last job of a batch ended; None while a job is active, or without such a batch."""
        with self._db.read() as session:
            return _last_ended_at(session, batch_id)

    def note(self, batch_id: str, ended_at: datetime) -> bool:
        """Note when a batch ended, once its manifest is written; False if one of its jobs was retried since."""
        with self._db.write() as session:
            batch = locked_batch(session, batch_id)
            if batch is None or _last_ended_at(session, batch_id) != ended_at:
                return False
            batch.ended_at = ended_at
        log.info("ended batch_id=%s", batch_id)
        return True

    def noted(self, batch_id: str) -> bool:
        """Whether the end of a batch is noted, and so its manifest written."""
        with self._db.read() as session:
            return session.scalar(sa.select(BatchRow.ended_at).where(BatchRow.id == batch_id)) is not None

    def entries(self, batch_id: str) -> Iterator[dict[str, Any]]:
        """Yield the manifest's entry of each job of a batch, in order; facts that are unknown are left out."""
        columns = (
            JobRow.id,
            JobRow.position,
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
            ArtifactRow.facts,
        )
        image = sa.and_(ArtifactRow.job_id == JobRow.id, ArtifactRow.n == 0, ArtifactRow.role == Role.IMAGE.value)
        query = (
            sa.select(*columns)
            .outerjoin(AttemptRow, sa.and_(AttemptRow.job_id == JobRow.id, AttemptRow.attempt == JobRow.attempt))
            .outerjoin(ArtifactRow, image)
            .where(JobRow.batch_id == batch_id)
            .order_by(JobRow.position)
            .limit(_PAGE)
        )
        after = 0
        while True:
            with self._db.read() as session:
                rows = session.execute(query.where(JobRow.position > after)).mappings().all()
            for row in rows:
                entry = {"id": row["id"], "index": row["position"], **dict(row), **(row["facts"] or {})}
                for name in ("position", "facts", "render_seconds"):  # `index`, the facts themselves, and `seconds`
                    entry.pop(name, None)
                yield {name: value for name, value in entry.items() if value not in (None, [])}
            if len(rows) < _PAGE:
                return
            after = rows[-1]["position"]


def _last_ended_at(session: Session, batch_id: str) -> datetime | None:
    if session.scalar(sa.select(ACTIVE_JOBS).where(BatchRow.id == batch_id)):
        return None
    return session.scalar(sa.select(sa.func.max(JobRow.finished_at)).where(JobRow.batch_id == batch_id))

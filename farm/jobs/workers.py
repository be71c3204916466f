"""`Workers`: the registered worker processes, and the models that live workers serve."""

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.jobs.database import Database, now, now_plus
from farm.jobs.records import WorkerInfo, worker_info
from farm.jobs.schema import WorkerRow
from farm.jobs.served_models import ServedModel, served_columns, served_models
from farm.settings import Settings


def alive(lease_seconds: float) -> sa.ColumnElement[bool]:
    """A worker has sent a heartbeat within one lease time."""
    return WorkerRow.seen_at > now_plus(sa.literal(-lease_seconds))


def live_models(
    session: Session, lease_seconds: float, *which: sa.ColumnElement[bool]
) -> list[tuple[ServedModel, ...]]:
    """Return the models of each live worker that satisfies the conditions."""
    query = sa.select(WorkerRow.models).where(alive(lease_seconds), *which)
    return [served_models(models) for models in session.scalars(query)]


class Workers:
    """Registers workers and lists them."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._lease_seconds = settings.lease_seconds

    def register(self, worker: WorkerInfo) -> None:
        """Record a worker that has just started; replaces an earlier worker of that name."""
        values = {
            "device": worker.device,
            "dtype": worker.dtype,
            "slots": worker.slots,
            "version": worker.version,
            **served_columns(worker.models, worker.memory),
            "metrics_url": worker.metrics_url,
            "started_at": now(),
            "seen_at": now(),
        }
        with self._db.write() as session:
            session.execute(sa.delete(WorkerRow).where(WorkerRow.name == worker.name))
            session.execute(sa.insert(WorkerRow).values(name=worker.name, **values))

    def describe(self, worker: WorkerInfo) -> None:
        """Record the models of a worker and its device's memory as they are now."""
        with self._db.write() as session:
            values = served_columns(worker.models, worker.memory)
            session.execute(sa.update(WorkerRow).where(WorkerRow.name == worker.name).values(values))

    def deregister(self, worker: str) -> None:
        """Remove a worker that has shut down cleanly."""
        with self._db.write() as session:
            session.execute(sa.delete(WorkerRow).where(WorkerRow.name == worker))

    def all(self) -> list[WorkerInfo]:
        """Return every registered worker, by name; dead ones are included."""
        with self._db.read() as session:
            rows = session.execute(sa.select(WorkerRow, alive(self._lease_seconds)).order_by(WorkerRow.name))
            return [worker_info(row, alive=bool(lives)) for row, lives in rows]

    def slots(self) -> dict[str, int]:
        """Return the number of slots of the live workers that serve each model."""
        found: dict[str, int] = {}
        for worker in self.all():
            for name in {model.name for model in worker.models} if worker.alive else ():
                found[name] = found.get(name, 0) + worker.slots
        return found

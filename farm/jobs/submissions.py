"""`Submissions`: writes batches to SQL, staged in invisible chunks and accepted as a whole."""

import hashlib
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from farm.errors import DatabaseUnavailable, InvalidInput, KeyUsed, NotFound, Problem
from farm.jobs.conditions import ACCEPTED
from farm.jobs.database import Database, now, now_plus
from farm.jobs.schema import BatchRow, JobRow
from farm.specs.object_keys import slug
from farm.specs.spec import MAX_SEED, RenderSpec

log = logging.getLogger(__name__)

ABANDONED_SECONDS = 3600.0
"""A submission that has written no job for so long is abandoned."""
_CHUNK = 2000
"""How many rows a transaction writes or deletes: some 50 ms on SQLite, during which workers wait."""

_COLUMNS = ("id", "batch_id", "index", "spec", "model", "priority", "work_sha256")
_DEFAULTS: dict[str, Any] = {
    column.name: column.default.arg
    for column in JobRow.__table__.columns
    if isinstance(column.default, sa.ColumnDefault) and column.default.is_scalar and not column.server_default
}
_ALL_COLUMNS = (*_COLUMNS, *_DEFAULTS)
_Row = tuple[Any, ...]


def new_batch_id(name: str) -> str:
    """A unique id that starts with the batch's name."""
    alphabet = "23456789abcdefghjkmnpqrstuvwxyz"
    return "-".join((slug(name)[:30].strip("-") or "batch", "".join(secrets.choice(alphabet) for _ in range(8))))


def seed_from(key: str, place: int) -> int:
    """The seed of a job, derived from its submission's key and its index."""
    return int.from_bytes(hashlib.sha256(f"{place}\n{key}".encode()).digest()[:8]) % (MAX_SEED + 1)


class Submissions:
    """Writes batches with their jobs, and discards abandoned submissions."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def submit(
        self,
        name: str,
        owner: str,
        priority: int,
        specs: Iterable[RenderSpec],
        *,
        key: str | None = None,
        reuse: bool = True,
        weight: float = 1.0,
    ) -> str:
        """Write a batch and all its jobs as pending; returns the batch's id.

        All or nothing: the jobs are staged in short transactions under an invisible batch, and accepted in one
        statement. An exception, also of `specs`, deletes the staged rows; after a crash, they are swept later.

        With a `key`, a second submission of the same specs in the same order by the same owner writes nothing and
        returns the id of the first batch. Missing seeds are then derived from the key and the index. With `reuse`, a
        job may get a copy of an existing picture of the same work.

        Raises `InvalidInput` without specs, `KeyUsed` if the key was used before for other specs.
        """
        batch = BatchRow(
            id=new_batch_id(name), name=name, owner=owner, priority=priority, total=0, reuse=reuse, weight=weight
        )
        # Read now: after its session, the instance would be loaded again.
        batch_id, content = batch.id, hashlib.sha256()
        rows = _rows(batch, _seeded(specs, key) if key is not None else specs, content.update)
        first = None if key is None else self._first(owner, key)
        if first is not None:
            total = sum(1 for _ in rows)
            return self._same(first, key, total, content.hexdigest())
        total, staged = 0, False
        try:
            ahead = _chunks(rows)
            chunk = next(ahead, [])
            while chunk:
                total += len(chunk)
                following = next(ahead, [])
                accept = {"total": total, "key": key, "content_sha256": key and content.hexdigest()}
                with self._db.write() as session:
                    _stage(session, None if staged else batch, batch_id, chunk)
                    if not following:
                        _set_staged(session, batch_id, accepted_at=now(), created_at=now(), **accept)
                staged, chunk = True, following
        except IntegrityError:
            # Another submission with this key was accepted meanwhile.
            self.discard(batch_id)
            first = None if key is None else self._first(owner, key)
            if first is None:
                raise
            return self._same(first, key, total, content.hexdigest())
        except BaseException as error:
            # The commit may have succeeded although its answer was lost.
            if not (isinstance(error, DatabaseUnavailable) and self._accepted(batch_id)):
                if staged:
                    self._discard_quietly(batch_id)
                raise
        if not total:
            raise InvalidInput([Problem("", "", "there is nothing to render: no prompts")])
        log.info("submitted batch_id=%s name=%r jobs=%d", batch_id, name, total)
        return batch_id

    def abandoned(self, limit: int = 100) -> list[str]:
        """Return the ids of batches whose submission was interrupted by a crash."""
        old = BatchRow.created_at < now_plus(sa.literal(-ABANDONED_SECONDS))
        with self._db.read() as session:
            return list(session.scalars(sa.select(BatchRow.id).where(~ACCEPTED, old).limit(limit)))

    def discard(self, batch_id: str) -> None:
        """Delete a batch that is not accepted, and its jobs, from SQL, in short transactions."""
        unseen = sa.select(BatchRow.id).where(BatchRow.id == batch_id, ~ACCEPTED)
        some = sa.select(JobRow.id).where(JobRow.batch_id.in_(unseen)).limit(_CHUNK).scalar_subquery()
        left = True
        while left:
            with self._db.write() as session:
                left = bool(session.execute(sa.delete(JobRow).where(JobRow.id.in_(some)).returning(JobRow.id)).all())
        with self._db.write() as session:
            session.execute(sa.delete(BatchRow).where(BatchRow.id == batch_id, ~ACCEPTED))

    def _accepted(self, batch_id: str) -> bool:
        """Whether the batch is known to be accepted."""
        try:
            with self._db.read() as session:
                return session.scalar(sa.select(BatchRow.id).where(BatchRow.id == batch_id, ACCEPTED)) is not None
        except DatabaseUnavailable:
            return False

    def _discard_quietly(self, batch_id: str) -> None:
        try:
            self.discard(batch_id)
        except DatabaseUnavailable as error:
            log.warning("batch_id=%s is swept later: %s", batch_id, error)

    def _first(self, owner: str, key: str) -> BatchRow | None:
        with self._db.read() as session:
            return session.scalars(
                sa.select(BatchRow).where(BatchRow.owner == owner, BatchRow.key == key)
            ).one_or_none()

    def _same(self, first: BatchRow, key: str | None, total: int, sha256: str) -> str:
        if (total, sha256) != (first.total, first.content_sha256):
            raise KeyUsed(
                f"key {key!r} was used for batch {first.id} of {first.total} jobs, and these {total} are not the same; "
                "use another key"
            )
        log.info("submitted before batch_id=%s key=%r", first.id, key)
        return first.id


def _seeded(specs: Iterable[RenderSpec], key: str) -> Iterator[RenderSpec]:
    """The specs, with missing seeds derived from the key."""
    for index, spec in enumerate(specs, 1):
        if "seed" in spec.model_fields_set:
            yield spec
        else:
            yield spec.model_copy(update={"seed": seed_from(key, index)})


def _rows(batch: BatchRow, specs: Iterable[RenderSpec], seen: Callable[[bytes], None]) -> Iterator[_Row]:
    batch_id, priority, reuse, defaults = batch.id, batch.priority, batch.reuse, tuple(_DEFAULTS.values())
    for index, spec in enumerate(specs, 1):
        text = spec.to_json()
        data = text.encode()
        seen(data)
        seen(b"\n")
        # A random seed makes the work unique: such jobs are left out of the index.
        work = hashlib.sha256(data).hexdigest() if reuse and "seed" in spec.model_fields_set else None
        yield (f"{batch_id}-{index}", batch_id, index, text, spec.model, priority, work, *defaults)


def _chunks(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


def _stage(session: Session, batch: BatchRow | None, batch_id: str, rows: list[_Row]) -> None:
    """Write rows of a batch that is not accepted yet, and record that its submission is alive."""
    if batch is not None:
        batch.created_at = now()
        session.add(batch)
        session.flush()
    else:
        _set_staged(session, batch_id, created_at=now())
    connection = session.connection()
    columns = ", ".join(f'"{name}"' for name in _ALL_COLUMNS)
    if connection.dialect.name == "sqlite":
        # The driver's own `executemany`: SQLAlchemy's takes three times as long for a million rows.
        places = ", ".join("?" * len(_ALL_COLUMNS))
        connection.exec_driver_sql(f"INSERT INTO jobs ({columns}) VALUES ({places})", rows)  # noqa: S608
        return
    try:
        cursor: Any = connection.connection.cursor()  # psycopg's cursor: SQLAlchemy has no COPY
        with cursor, cursor.copy(f"COPY jobs ({columns}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
    except (psycopg.OperationalError, psycopg.errors.IdleInTransactionSessionTimeout) as error:
        raise DatabaseUnavailable(f"the database does not answer: {' '.join(str(error).split())}") from error


def _set_staged(session: Session, batch_id: str, **values: Any) -> None:
    staged = sa.update(BatchRow).where(BatchRow.id == batch_id, ~ACCEPTED).values(**values).returning(BatchRow.id)
    if session.execute(staged).one_or_none() is None:
        raise NotFound(f"batch {batch_id} was swept while its jobs were written: none came for an hour; try again")

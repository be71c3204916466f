"""The sessions that read and write the SQL tables, and the database's clock, on SQLite and PostgreSQL alike."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.expression import FunctionElement

from farm.errors import DatabaseUnavailable, NotConfigured, SchemaMismatch
from farm.jobs.schema import ReleaseRow, UTCDateTime
from farm.version import __version__

log = logging.getLogger(__name__)

T = TypeVar("T")

_AT_COMMIT = "at commit"
CONNECT_SECONDS = 5
_SILENT_SECONDS, _PROBE_SECONDS = 15, 5
_FROZEN_SECONDS = 5
"""How long PostgreSQL lets a transaction do nothing: others may wait for what it has locked."""
_LOCK_NOT_AVAILABLE, _DEADLOCK_DETECTED = "55P03", "40P01"
"""https://www.postgresql.org/docs/current/errcodes-appendix.html"""
_DEADLOCKS = 5


class now_plus(FunctionElement[datetime]):  # noqa: N801  (an SQL function, like sqlalchemy.func's)
    """The database's own clock plus some seconds: no worker's clock ever decides about a lease."""

    type = UTCDateTime()
    inherit_cache = True
    name = "now_plus"


@compiles(now_plus, "postgresql")
def _now_plus_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    # statement_timestamp() is stable within a statement, so that an index can serve the comparison.
    seconds = compiler.process(element.clauses, **kw)
    return f"(statement_timestamp() + make_interval(secs => CAST({seconds} AS double precision)))"


@compiles(now_plus, "sqlite")
def _now_plus_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    # The format SQLAlchemy itself stores, so that text compares as time.
    seconds = compiler.process(element.clauses, **kw)
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', ({seconds}) || ' seconds')"


def at_commit(session: Session, call: Callable[[], None]) -> None:
    """Call a function once a session of `Database.write` has committed; never if it does not."""
    # SQLAlchemy's event of the same name takes as long to register as a small transaction.
    session.info.setdefault(_AT_COMMIT, []).append(call)


def now() -> now_plus:
    """The database's own clock."""
    return now_plus(sa.literal(0.0))


def database_url(url: str) -> sa.URL:
    """A database URL, read; PostgreSQL's driver is psycopg. Raises `NotConfigured`."""
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise NotConfigured("FARM_DATABASE_URL is not a database URL") from None
    if parsed.drivername in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    return parsed


class Database:
    """Connections to the database at a SQLAlchemy URL.

    Every session is one transaction: `read()` sees one snapshot, `write()` commits at its end or changes nothing.
    Both raise `DatabaseUnavailable` when the database does not answer.
    """

    def __init__(self, url: str) -> None:
        self.url = parsed = database_url(url)
        self.outages = 0
        """How often it did not answer."""
        try:
            self.engine = _sqlite(parsed) if parsed.get_backend_name() == "sqlite" else _postgresql(parsed)
        except (ImportError, sa.exc.NoSuchModuleError) as error:
            raise NotConfigured(
                f"FARM_DATABASE_URL: {parsed.drivername} can't be used ({error}); use sqlite or postgresql"
            ) from error

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that changes nothing."""
        with self._reached(), Session(self.engine) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that commits at the end of its block; any error undoes all of it."""
        with self._reached():
            with Session(self.engine) as session, session.begin():
                session.connection(execution_options={"writes": True})
                yield session
            for call in session.info.get(_AT_COMMIT, ()):
                call()

    def written(self, change: Callable[[Session], T]) -> T:
        """What `change` returns of a session that then commits; done anew if PostgreSQL undid it to end a deadlock.

        For who would otherwise tell a person to try again: programs do so anyway.
        """
        for _ in range(_DEADLOCKS):
            try:
                with self.write() as session:
                    return change(session)
            except DatabaseUnavailable as error:
                if _sqlstate(error.__cause__) != _DEADLOCK_DETECTED:
                    raise
                log.info("done anew: %s", error)
        with self.write() as session:
            return change(session)

    def exclusive(self, session: Session, number: int) -> None:
        """Wait until this transaction is the only one that holds that lock number; it ends with the transaction.

        SQLite has one writer anyway.
        """
        if self.engine.dialect.name == "postgresql":
            session.execute(sa.select(sa.func.pg_advisory_xact_lock(number)))

    def migrate(self) -> None:
        """Bring the schema up to this version's; doing it twice, or from many processes at once, is harmless."""
        with self._reached(), self.engine.connect() as connection:
            if self.engine.dialect.name == "postgresql":
                connection.detach()  # closed in the end, and the lock with it: a pool would keep both
                connection.execute(sa.select(sa.func.pg_advisory_lock(_MIGRATION_LOCK)))
                connection.commit()
            if self._newer(connection) is None:
                connection.rollback()
                self._upgrade(connection)

    def _upgrade(self, connection: sa.Connection) -> None:
        """Take one step after the other, each when its tables are free.

        PostgreSQL lets nobody at a table for which a step waits. Behind whoever reads long, such as a backup, it must
        not wait for longer than leases can.
        """
        config = _alembic()
        config.attributes["connection"] = connection.execution_options(writes=True)
        if self.engine.dialect.name == "postgresql":
            connection.exec_driver_sql(f"SET lock_timeout = '{_STEP_SECONDS}s'")
            connection.commit()
        deadline = time.monotonic() + _MIGRATION_SECONDS
        while True:
            try:
                command.upgrade(config, "head")
                connection.commit()
            except OperationalError as error:
                if _sqlstate(error) != _LOCK_NOT_AVAILABLE or time.monotonic() > deadline:
                    raise
                connection.rollback()
                log.warning("somebody reads or writes for long, and the schema waits: %s", _line(error))
                time.sleep(_STEP_SECONDS)
            else:
                return

    def check_schema(self) -> None:
        """Raise `SchemaMismatch` unless programs of this version work with the schema.

        It may be a later version's, while a farm is upgraded program by program, if that one says that it serves
        this version too.
        """
        with self._reached(), self.engine.connect() as connection:
            if self._newer(connection) is not None:
                return
            found = MigrationContext.configure(connection).get_current_revision()
        if found is None:
            raise SchemaMismatch("the database has no farm schema yet: run `farm migrate`")
        head = _scripts().get_current_head()
        if found != head:
            raise SchemaMismatch(
                f"the database's schema is {found}, and farm {__version__} needs {head}: run `farm migrate` of this "
                "version first; what runs goes on meanwhile"
            )

    def _newer(self, connection: sa.Connection) -> str | None:
        """The schema's revision if it is a later version's that serves this one; raises `SchemaMismatch` if not."""
        found = MigrationContext.configure(connection).get_current_revision()
        scripts = _scripts()
        head = scripts.get_current_head()
        if found is None or head is None or any(script.revision == found for script in scripts.walk_revisions()):
            return None
        release = connection.execute(
            sa.select(ReleaseRow.version, ReleaseRow.serves_from).where(ReleaseRow.revision == found)
        ).one_or_none()
        if release is None:
            raise SchemaMismatch(
                f"the database's schema is {found}, which farm {__version__} (schema {head}) knows nothing of: "
                "install the version that the rest of the farm runs"
            )
        if head < release.serves_from:
            raise SchemaMismatch(
                f"the database's schema is {found}, of farm {release.version}, and this is farm {__version__} (schema "
                f"{head}), which it no longer serves: pip install 'diffusion-farm=={release.version}' here"
            )
        return found

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except OperationalError as error:
            self.outages += 1
            raise DatabaseUnavailable(f"the database {self.shown} does not answer: {_line(error)}") from error
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            self.outages += 1
            raise DatabaseUnavailable(f"the connection to {self.shown} broke: {_line(error)}") from error

    @property
    def shown(self) -> str:
        """Its address as it may be shown: libpq takes passwords in the query as well."""
        secret = [name for name in self.url.query if "pass" in name.lower()]
        return self.url.difference_update_query(secret).render_as_string(hide_password=True)


def _sqlstate(error: BaseException | None) -> str | None:
    return getattr(error.orig, "sqlstate", None) if isinstance(error, DBAPIError) else None


def _line(error: DBAPIError) -> str:
    return " ".join(str(error.orig).split())


_MIGRATION_LOCK = 0x6661726D
_MIGRATION_SECONDS = 600.0
_STEP_SECONDS = 2


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_alembic())


def _postgresql(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(
        url,
        pool_pre_ping=True,
        pool_size=10,
        max_overflow=20,
        connect_args={
            "connect_timeout": CONNECT_SECONDS,
            # A host that is gone without a word is noticed in seconds, and not when TCP gives up after a quarter hour.
            "tcp_user_timeout": 1000 * _SILENT_SECONDS,
            "keepalives_idle": _PROBE_SECONDS,
            "keepalives_interval": _PROBE_SECONDS,
        },
    )

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        # And so does the server: what a host that is gone has locked in the middle of a transaction would stay locked
        # for two hours otherwise. Not by libpq's `options`, which poolers refuse.
        connection.autocommit = True
        connection.execute(
            f"SELECT set_config('tcp_keepalives_idle', '{_PROBE_SECONDS}', false),"
            f" set_config('tcp_keepalives_interval', '{_PROBE_SECONDS}', false),"
            f" set_config('tcp_user_timeout', '{1000 * _SILENT_SECONDS}', false),"
            # The kernel of a process that is frozen amid a transaction goes on answering.
            f" set_config('idle_in_transaction_session_timeout', '{1000 * _FROZEN_SECONDS}', false)"
        )
        connection.autocommit = False

    return engine


def _sqlite(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(url, connect_args={"timeout": 30, "check_same_thread": False})

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        # The driver must not open transactions by itself: it opens deferred ones, and a reader that turns writer
        # fails at once when another has written meanwhile, whatever the timeout.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine

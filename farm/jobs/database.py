"""Database sessions, the schema's migration, and the database's clock, on SQLite and PostgreSQL."""

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
"""How long a transaction may be idle on PostgreSQL: others may wait for its locks."""
_LOCK_NOT_AVAILABLE, _DEADLOCK_DETECTED = "55P03", "40P01"
"""https://www.postgresql.org/docs/current/errcodes-appendix.html"""
_DEADLOCKS = 5


class now_plus(FunctionElement[datetime]):  # noqa: N801  (an SQL function, like sqlalchemy.func's)
    """The database's clock plus some seconds: leases never depend on a worker's clock."""

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
    # The format that SQLAlchemy stores, so that the text compares as a time.
    seconds = compiler.process(element.clauses, **kw)
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', ({seconds}) || ' seconds')"


def at_commit(session: Session, call: Callable[[], None]) -> None:
    """Call a function after a session of `Database.write` has committed; never if it is rolled back."""
    # SQLAlchemy's event of the same name takes as long to register as a small transaction.
    session.info.setdefault(_AT_COMMIT, []).append(call)


def now() -> now_plus:
    """The current time of the database's clock."""
    return now_plus(sa.literal(0.0))


def database_url(url: str) -> sa.URL:
    """Parse a database URL; the driver for PostgreSQL is psycopg. Raises `NotConfigured`."""
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
        """How often the database did not answer."""
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
        """A session that commits at the end of its block; any error rolls it back."""
        with self._reached():
            with Session(self.engine) as session, session.begin():
                session.connection(execution_options={"writes": True})
                yield session
            for call in session.info.get(_AT_COMMIT, ()):
                call()

    def written(self, change: Callable[[Session], T]) -> T:
        """Run `change` in a transaction and return its result; repeat it after a deadlock.

        For requests of users, which would otherwise fail: the farm's processes retry anyway.
        """
        for _ in range(_DEADLOCKS):
            try:
                with self.write() as session:
                    return change(session)
            except DatabaseUnavailable as error:
                if _sqlstate(error.__cause__) != _DEADLOCK_DETECTED:
                    raise
                log.info("retrying a transaction: %s", error)
        with self.write() as session:
            return change(session)

    def exclusive(self, session: Session, number: int) -> None:
        """Wait for the lock with that number, and hold it until the transaction ends.

        Does nothing on SQLite, which has one writer.
        """
        if self.engine.dialect.name == "postgresql":
            session.execute(sa.select(sa.func.pg_advisory_xact_lock(number)))

    def migrate(self) -> None:
        """Upgrade the schema to this version's; safe to repeat, and to run from many processes at once."""
        with self._reached(), self.engine.connect() as connection:
            if self.engine.dialect.name == "postgresql":
                connection.detach()  # closing it releases the lock: a pool would keep both
                connection.execute(sa.select(sa.func.pg_advisory_lock(_MIGRATION_LOCK)))
                connection.commit()
            if self._newer(connection) is None:
                connection.rollback()
                self._upgrade(connection)

    def _upgrade(self, connection: sa.Connection) -> None:
        """Run the migrations one by one, each when its tables are free.

        While a migration waits for a table, PostgreSQL blocks all other access to it. Behind a long reader, such as a
        backup, it must not wait for longer than the leases last.
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
                log.warning("the migration waits for a long transaction: %s", _line(error))
                time.sleep(_STEP_SECONDS)
            else:
                return

    def check_schema(self) -> None:
        """Raise `SchemaMismatch` unless this version works with the schema.

        A later version's schema is accepted if it declares that it serves this version, so that a farm can be
        upgraded program by program.
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
                "version first; running programs continue"
            )

    def _newer(self, connection: sa.Connection) -> str | None:
        """Return a later version's schema revision, or None; raises `SchemaMismatch` if this version can't use it."""
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
                f"the database's schema is {found}, which farm {__version__} (schema {head}) does not know: "
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
        """The URL without passwords, which libpq also takes in the query."""
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
            # Detect a dead host in seconds: TCP itself gives up after a quarter of an hour.
            "tcp_user_timeout": 1000 * _SILENT_SECONDS,
            "keepalives_idle": _PROBE_SECONDS,
            "keepalives_interval": _PROBE_SECONDS,
        },
    )

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        # The same on the server: otherwise the locks of a dead host's transaction would last for two hours. Not by
        # libpq's `options`, which poolers refuse.
        connection.autocommit = True
        connection.execute(
            f"SELECT set_config('tcp_keepalives_idle', '{_PROBE_SECONDS}', false),"
            f" set_config('tcp_keepalives_interval', '{_PROBE_SECONDS}', false),"
            f" set_config('tcp_user_timeout', '{1000 * _SILENT_SECONDS}', false),"
            # Keepalives do not detect a process that is frozen in a transaction: its kernel answers.
            f" set_config('idle_in_transaction_session_timeout', '{1000 * _FROZEN_SECONDS}', false)"
        )
        connection.autocommit = False

    return engine


def _sqlite(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(url, connect_args={"timeout": 30, "check_same_thread": False})

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        # The driver must not open transactions: it opens deferred ones, in which a write after a read fails at once,
        # whatever the timeout, if another connection has written meanwhile.
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

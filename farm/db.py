"""The SQL tables, and the sessions that read and write them, on SQLite and PostgreSQL alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.sql.expression import FunctionElement

from farm.errors import DatabaseUnavailable, NotConfigured, SchemaMismatch
from farm.states import JobState

CONNECT_SECONDS = 5


class UTCDateTime(sa.types.TypeDecorator[datetime]):
    """An aware UTC time: `timestamptz` on PostgreSQL, ISO text on SQLite, which knows no zones."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Turn any aware time into UTC."""
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Give back an aware UTC time."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


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


def now() -> now_plus:
    """The database's own clock."""
    return now_plus(sa.literal(0.0))


_Names = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class Base(DeclarativeBase):
    """What all tables share: names for constraints, and types."""

    metadata = _Names
    type_annotation_map = {  # noqa: RUF012  (SQLAlchemy's own way to say it)
        datetime: UTCDateTime(),
        dict[str, Any]: sa.JSON(),
        list[str]: sa.JSON(),
        list[dict[str, Any]]: sa.JSON(),
        float: sa.Double(),
    }


class BatchRow(Base):
    """One bulk submission."""

    __tablename__ = "batches"

    id: Mapped[str] = mapped_column(sa.String(80), primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(200))
    owner: Mapped[str] = mapped_column(sa.String(200))
    priority: Mapped[int]
    total: Mapped[int]
    created_at: Mapped[datetime]

    __table_args__ = (
        sa.Index("ix_batches_created_at", "created_at"),
        sa.Index("ix_batches_name_created_at", "name", "created_at"),
    )


def _where(state: JobState) -> dict[str, Any]:
    clause = sa.text(f"state = '{state.value}'")
    return {"sqlite_where": clause, "postgresql_where": clause}


_STALE = sa.text("checkpoint_key IS NOT NULL AND finished_at IS NOT NULL")


class JobRow(Base):
    """One spec to be rendered into one image. Only `JobStore` writes these."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(sa.String(100), primary_key=True)
    """`{batch}-{index}`: the Celery task's id too."""
    batch_id: Mapped[str] = mapped_column(sa.ForeignKey("batches.id", ondelete="CASCADE"))
    index: Mapped[int]
    """Its place in the batch, from 1."""
    spec: Mapped[dict[str, Any]]
    model: Mapped[str] = mapped_column(sa.String(200))
    """The spec's, for the dispatcher's index."""
    state: Mapped[str] = mapped_column(sa.String(16), default=JobState.PENDING.value)
    priority: Mapped[int]
    """The batch's, for the dispatcher's index: 0 to 100, the higher the sooner."""
    rank: Mapped[float]
    """The start tag of start-time fair queueing (Goyal et al. 1996): among equal priorities the lowest is served
    first. It counts up by one a job from where the backlog stood when the batch came in, so that batches share the
    farm job by job instead of waiting behind each other."""

    attempt: Mapped[int] = mapped_column(default=0)
    """The fencing number: it grows with every claim."""
    tries: Mapped[int] = mapped_column(default=0)
    """Errors so far."""
    lost_leases: Mapped[int] = mapped_column(default=0)
    worker: Mapped[str | None] = mapped_column(sa.String(200))
    lease_until: Mapped[datetime | None]
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    """Somebody wants a running job stopped; its worker reads it with its next beat."""
    steps_done: Mapped[int] = mapped_column(default=0)
    seconds_per_step: Mapped[float | None]
    """Measured by its worker, the latest."""
    checkpoint_key: Mapped[str | None] = mapped_column(sa.String(400))
    """The object from which an attempt after a lost lease or a hand-back goes on; of a job that has ended, one
    to be deleted."""
    preview_until: Mapped[datetime | None]
    """Until then somebody watches it, and its worker shows how it gets on."""
    preview_vae: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    """Whether previews are decoded by the VAE, and not roughly from the latents."""

    queued_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    error: Mapped[str | None] = mapped_column(sa.Text)
    """Why it failed, or why its last try did."""

    image_key: Mapped[str | None] = mapped_column(sa.String(400))
    image_sha256: Mapped[str | None] = mapped_column(sa.String(64))
    image_bytes: Mapped[int | None]
    width: Mapped[int | None]
    height: Mapped[int | None]
    model_sha256: Mapped[str | None] = mapped_column(sa.String(64))
    render_seconds: Mapped[float | None]
    warnings: Mapped[list[str] | None]

    __table_args__ = (
        sa.UniqueConstraint("batch_id", "index"),
        # How far a batch is, and what ended since somebody last looked.
        sa.Index("ix_jobs_batch_id_state", "batch_id", "state"),
        sa.Index("ix_jobs_batch_id_finished_at", "batch_id", "finished_at"),
        # The dispatcher's three questions, each over few rows: what is next, what is in Redis, whose lease ran out.
        sa.Index("ix_jobs_backlog", "model", sa.desc("priority"), "rank", "id", **_where(JobState.PENDING)),
        sa.Index("ix_jobs_queued", "model", "queued_at", **_where(JobState.QUEUED)),
        sa.Index("ix_jobs_running", "lease_until", **_where(JobState.RUNNING)),
        # A new batch starts where the backlog stands.
        sa.Index("ix_jobs_backlog_rank", "rank", **_where(JobState.PENDING)),
        # What is to be swept out of the object store.
        sa.Index("ix_jobs_stale_checkpoints", "finished_at", sqlite_where=_STALE, postgresql_where=_STALE),
        sa.CheckConstraint("state IN ({})".format(", ".join(f"'{state.value}'" for state in JobState)), name="state"),
    )


class WorkerRow(Base):
    """One worker that is or was there, and what it holds."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(sa.String(200), primary_key=True)
    """Celery's nodename, as Flower shows it."""
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    device: Mapped[str] = mapped_column(sa.String(100))
    dtype: Mapped[str] = mapped_column(sa.String(20))
    slots: Mapped[int]
    version: Mapped[str] = mapped_column(sa.String(40))
    models: Mapped[list[dict[str, Any]]]
    """Of each model it serves: name, and once it is loaded sha256, bytes, family, samplers."""


class Database:
    """Connections to the database at a SQLAlchemy URL.

    Every session is one transaction: `read()` sees one snapshot, `write()` commits at its end or changes nothing.
    Both raise `DatabaseUnavailable` when the database does not answer.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = sa.make_url(url)
        except sa.exc.ArgumentError:
            raise NotConfigured("FARM_DATABASE_URL is not a database URL") from None
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        self.url = parsed
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
        with self._reached(), Session(self.engine) as session, session.begin():
            session.connection(execution_options={"writes": True})
            yield session

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
                connection.execute(sa.select(sa.func.pg_advisory_lock(_MIGRATION_LOCK)))
                connection.commit()
            config = _alembic()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.commit()

    def check_schema(self) -> None:
        """Raise `SchemaMismatch` unless the schema is this version's."""
        with self._reached(), self.engine.connect() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
        head = ScriptDirectory.from_config(_alembic()).get_current_head()
        if found is None:
            raise SchemaMismatch("the database has no farm schema yet: run `farm migrate`")
        if found != head:
            raise SchemaMismatch(
                f"the database's schema is {found}, this version works with {head}: run `farm migrate` with the "
                "newest version, and upgrade what is older"
            )

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except OperationalError as error:
            raise DatabaseUnavailable(f"the database {self._shown} does not answer: {_line(error)}") from error
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            raise DatabaseUnavailable(f"the connection to {self._shown} broke: {_line(error)}") from error

    @property
    def _shown(self) -> str:
        return self.url.render_as_string(hide_password=True)


def _line(error: DBAPIError) -> str:
    return " ".join(str(error.orig).split())


_MIGRATION_LOCK = 0x6661726D


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    return config


def _postgresql(url: sa.URL) -> sa.Engine:
    return sa.create_engine(
        url,
        pool_pre_ping=True,
        pool_size=10,
        max_overflow=20,
        connect_args={"connect_timeout": CONNECT_SECONDS},
    )


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

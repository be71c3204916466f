"""The SQL tables, on SQLite and PostgreSQL."""

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from farm.jobs.states import JobState


class UTCDateTime(sa.types.TypeDecorator[datetime]):
    """An aware UTC time: `timestamptz` on PostgreSQL, ISO text on SQLite, which has no time zones."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Convert an aware time to UTC."""
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Return an aware UTC time."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


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
    """The base of all tables: names of constraints, and column types."""

    metadata = _Names
    type_annotation_map = {  # noqa: RUF012  (SQLAlchemy's API)
        datetime: UTCDateTime(),
        dict[str, Any]: sa.JSON(),
        list[str]: sa.JSON(),
        list[dict[str, Any]]: sa.JSON(),
        float: sa.Double(),
    }


def _where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


class BatchRow(Base):
    """A bulk submission, and the settings for serving its jobs."""

    __tablename__ = "batches"

    id: Mapped[str] = mapped_column(sa.String(80), primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(200))
    owner: Mapped[str] = mapped_column(sa.String(200))
    priority: Mapped[int]
    total: Mapped[int]
    created_at: Mapped[datetime]
    accepted_at: Mapped[datetime | None]
    """NULL while its jobs are being written: until then only its submission sees it."""
    key: Mapped[str | None] = mapped_column(sa.String(200))
    """The submitter's idempotency key: a repeated submission is the same batch."""
    content_sha256: Mapped[str | None] = mapped_column(sa.String(64))
    """The hash of all its specs in order; set if it has a key."""
    paused: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    weight: Mapped[float] = mapped_column(default=1.0, server_default=sa.text("1"))
    """Its weight within its owner's share."""
    virtual_time: Mapped[float] = mapped_column(default=0.0, server_default=sa.text("0"))
    """Device seconds charged, divided by the weight: for the fair share."""
    reuse: Mapped[bool] = mapped_column(default=True, server_default=sa.true())
    """Whether its jobs may get copies of pictures of the same work."""
    ended_at: Mapped[datetime | None]
    """When its last job ended. Set once its manifest is written, cleared by a retry."""
    deleted_at: Mapped[datetime | None]
    """When it was marked for deletion; its rows are deleted after its objects."""

    __table_args__ = (
        sa.Index("ix_batches_created_at", "created_at"),
        sa.Index("ix_batches_name_created_at", "name", "created_at"),
        sa.Index("ix_batches_owner_key", "owner", "key", unique=True, **_where("key IS NOT NULL")),
        # Batches whose end is not noted yet, ended batches, and batches marked for deletion.
        sa.Index(
            "ix_batches_open",
            "accepted_at",
            **_where("accepted_at IS NOT NULL AND ended_at IS NULL AND deleted_at IS NULL"),
        ),
        sa.Index("ix_batches_ended_at", "ended_at", **_where("ended_at IS NOT NULL AND deleted_at IS NULL")),
        sa.Index("ix_batches_deleted_at", "deleted_at", **_where("deleted_at IS NOT NULL")),
    )


class OwnerRow(Base):
    """Settings of an owner; an owner without a row has the defaults."""

    __tablename__ = "owners"

    name: Mapped[str] = mapped_column(sa.String(200), primary_key=True)
    weight: Mapped[float] = mapped_column(default=1.0, server_default=sa.text("1"))
    """Its weight among the owners of equal priority."""
    most_queued: Mapped[int | None]
    """How many of its jobs may be queued in Redis at once; NULL: as many as the settings allow."""
    paused: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    virtual_time: Mapped[float] = mapped_column(default=0.0, server_default=sa.text("0"))
    """Device seconds charged, divided by the weight."""


class JobRow(Base):
    """A spec to be rendered into an image. Only the classes of `farm.jobs` write these."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(sa.String(100), primary_key=True)
    """`{batch}-{index}`; also the id of the Celery task."""
    batch_id: Mapped[str] = mapped_column(sa.ForeignKey("batches.id", ondelete="CASCADE"))
    position: Mapped[int] = mapped_column("index")
    """Its index in the batch, from 1."""
    spec: Mapped[dict[str, Any]]
    model: Mapped[str] = mapped_column(sa.String(200))
    """The spec's model, for the dispatcher's index."""
    state: Mapped[str] = mapped_column(sa.String(16), default=JobState.PENDING.value)
    priority: Mapped[int]
    """The batch's priority, for the dispatcher's index: 0 to 100, higher first."""
    not_before: Mapped[datetime | None]
    """It stays in the backlog until then: the back-off after an error."""
    avoid_worker: Mapped[str | None] = mapped_column(sa.String(200))
    """The worker on which it ran out of memory: another worker takes it, if possible."""
    paused: Mapped[bool] = mapped_column(default=False, server_default=sa.false())

    attempt: Mapped[int] = mapped_column(default=0)
    """The fencing token: every claim increments it."""
    tries: Mapped[int] = mapped_column(default=0)
    """The number of errors so far."""
    lost_leases: Mapped[int] = mapped_column(default=0)
    worker: Mapped[str | None] = mapped_column(sa.String(200))
    lease_until: Mapped[datetime | None]
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    """A cancellation of the running job is requested; its worker reads it at the next heartbeat."""
    steps_done: Mapped[int] = mapped_column(default=0)
    seconds_per_step: Mapped[float | None]
    """The latest measurement of its worker."""
    checkpoint_key: Mapped[str | None] = mapped_column(sa.String(400))
    """The object from which the next attempt resumes. Workers before release 0.2 note leftovers here too, by an
    empty string."""
    leftovers: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    """Whether attempts may have left objects beside the picture, which are deleted once the job has ended."""
    preview_until: Mapped[datetime | None]
    """Its worker writes previews until then."""
    preview_vae: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    """Whether previews are decoded by the VAE, instead of roughly from the latents."""

    queued_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    error: Mapped[str | None] = mapped_column(sa.Text)
    """Why it, or its last try, failed."""

    # The picture, for programs before release 0.2, which do not read artifacts.
    image_key: Mapped[str | None] = mapped_column(sa.String(400))
    image_sha256: Mapped[str | None] = mapped_column(sa.String(64))
    image_bytes: Mapped[int | None]
    width: Mapped[int | None]
    height: Mapped[int | None]
    model_sha256: Mapped[str | None] = mapped_column(sa.String(64))
    render_seconds: Mapped[float | None]
    device_seconds: Mapped[float | None]
    """Its share of the device's time."""
    charged_seconds: Mapped[float | None]
    """The device seconds charged to its batch and owner at dispatch, until the charge is corrected."""
    work_sha256: Mapped[str | None] = mapped_column(sa.String(64))
    """The hash of spec and model name; equal hashes mean equal work. NULL: never reused."""
    reused_from: Mapped[str | None] = mapped_column(sa.String(100))
    """The job whose picture was copied."""
    warnings: Mapped[list[str] | None]

    artifacts: Mapped[list["ArtifactRow"]] = relationship(lazy="raise", viewonly=True)

    __table_args__ = (
        sa.UniqueConstraint("batch_id", "index"),
        # The progress of a batch, its jobs in the order in which they ended, and its jobs with errors.
        sa.Index("ix_jobs_batch_id_state", "batch_id", "state"),
        sa.Index("ix_jobs_batch_id_finished_at", "batch_id", "finished_at"),
        sa.Index("ix_jobs_wrong", "batch_id", "index", **_where("error IS NOT NULL")),
        # The dispatcher's queries, each over few rows: pending jobs, jobs in Redis, expired leases.
        sa.Index("ix_jobs_backlog", "model", "batch_id", "index", **_where("state = 'pending'")),
        sa.Index("ix_jobs_queued", "model", "queued_at", **_where("state = 'queued'")),
        sa.Index("ix_jobs_running", "lease_until", **_where("state = 'running'")),
        # The charges that can be corrected.
        sa.Index(
            "ix_jobs_charged",
            "batch_id",
            **_where("charged_seconds IS NOT NULL AND state NOT IN ('queued', 'running')"),
        ),
        # The finished jobs and the active jobs of the same work.
        sa.Index("ix_jobs_work_done", "work_sha256", **_where("state = 'succeeded' AND work_sha256 IS NOT NULL")),
        sa.Index(
            "ix_jobs_work_active",
            "work_sha256",
            **_where("state IN ('pending', 'queued', 'running') AND work_sha256 IS NOT NULL"),
        ),
        # Ended jobs with leftovers in the object store; the second index is for workers before release 0.2.
        sa.Index("ix_jobs_leftovers", "finished_at", **_where("leftovers AND finished_at IS NOT NULL")),
        sa.Index(
            "ix_jobs_stale_checkpoints",
            "finished_at",
            **_where("checkpoint_key IS NOT NULL AND finished_at IS NOT NULL"),
        ),
        sa.CheckConstraint("state IN ({})".format(", ".join(f"'{state.value}'" for state in JobState)), name="state"),
    )


class AttemptRow(Base):
    """An ended attempt, written with the move that ended it; the current attempt is in the job's row."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    worker: Mapped[str | None] = mapped_column(sa.String(200))
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime]
    outcome: Mapped[str] = mapped_column(sa.String(20))
    error_class: Mapped[str | None] = mapped_column(sa.String(20))
    reason: Mapped[str | None] = mapped_column(sa.Text)
    steps_done: Mapped[int]
    device_seconds: Mapped[float | None]


class ArtifactRow(Base):
    """An object stored by a finished job: its picture, or an object beside it. Written with the job's success."""

    __tablename__ = "artifacts"

    job_id: Mapped[str] = mapped_column(sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    n: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Its index among the job's artifacts of this role, from 0."""
    role: Mapped[str] = mapped_column(sa.String(40), primary_key=True)
    key: Mapped[str] = mapped_column(sa.String(400))
    sha256: Mapped[str | None] = mapped_column(sa.String(64))
    media_type: Mapped[str] = mapped_column(sa.String(100))
    bytes: Mapped[int | None] = mapped_column(sa.BigInteger)
    width: Mapped[int | None]
    height: Mapped[int | None]
    facts: Mapped[dict[str, Any]]
    """The other fields of a `Picture`: no query filters by them."""


class JobCountRow(Base):
    """The number of a batch's jobs in a state, as the sum over shards.

    Triggers on `jobs` update it, so that it is always exact; a single shard may be negative. Because of the shards,
    transactions that move jobs of the same batch do not wait for each other.
    """

    __tablename__ = "job_counts"

    batch_id: Mapped[str] = mapped_column(sa.ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True)
    state: Mapped[str] = mapped_column(sa.String(16), primary_key=True)
    shard: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    n: Mapped[int] = mapped_column(sa.BigInteger)


class LeaderRow(Base):
    """The current leader for each role, and when its lease expires."""

    __tablename__ = "leaders"

    name: Mapped[str] = mapped_column(sa.String(100), primary_key=True)
    holder: Mapped[str] = mapped_column(sa.String(200))
    until: Mapped[datetime]


class WorkerRow(Base):
    """A registered worker, alive or not, and the models that it serves."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(sa.String(200), primary_key=True)
    """Celery's nodename, as in Flower."""
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    device: Mapped[str] = mapped_column(sa.String(100))
    dtype: Mapped[str] = mapped_column(sa.String(20))
    slots: Mapped[int]
    version: Mapped[str] = mapped_column(sa.String(40))
    models: Mapped[list[dict[str, Any]]]
    """An entry for each served model; `farm.jobs.served_models` writes and reads them."""
    memory_used: Mapped[int | None] = mapped_column(sa.BigInteger)
    """Bytes in use on its device; NULL if unknown."""
    memory_total: Mapped[int | None] = mapped_column(sa.BigInteger)
    metrics_url: Mapped[str | None] = mapped_column(sa.Text)
    """The URL of its metrics for Prometheus, if it serves any."""


class ReleaseRow(Base):
    """A revision of the schema, recorded by its migration for older programs."""

    __tablename__ = "releases"

    revision: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    """Alembic's revision id."""
    version: Mapped[str] = mapped_column(sa.String(40))
    """The farm's version that introduced it."""
    serves_from: Mapped[str] = mapped_column(sa.String(32))
    """The oldest revision whose programs also work with this schema."""

"""What SQL keeps: the tables, on SQLite and PostgreSQL alike."""

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from farm.jobs.states import JobState


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


def _where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


class BatchRow(Base):
    """One bulk submission, and how the jobs of it are to be served."""

    __tablename__ = "batches"

    id: Mapped[str] = mapped_column(sa.String(80), primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(200))
    owner: Mapped[str] = mapped_column(sa.String(200))
    priority: Mapped[int]
    total: Mapped[int]
    created_at: Mapped[datetime]
    accepted_at: Mapped[datetime | None]
    """None while its jobs are still being written: until then nobody but its writer sees it."""
    key: Mapped[str | None] = mapped_column(sa.String(200))
    """The submitter's own name for the submission: the same one again is the same batch."""
    content_sha256: Mapped[str | None] = mapped_column(sa.String(64))
    """Of all its specs in order, where there is a key."""
    paused: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    weight: Mapped[float] = mapped_column(default=1.0, server_default=sa.text("1"))
    """Its part of its owner's share."""
    virtual_time: Mapped[float] = mapped_column(default=0.0, server_default=sa.text("0"))
    """Device seconds served by weight, for the fair share."""
    reuse: Mapped[bool] = mapped_column(default=True, server_default=sa.true())
    """Whether a picture that another job of the same work has may serve."""
    ended_at: Mapped[datetime | None]
    """When its last job ended: noted once its manifest says so, and void again when one of its jobs is tried anew."""
    deleted_at: Mapped[datetime | None]
    """When it was given up; its rows go when its objects are deleted."""

    __table_args__ = (
        sa.Index("ix_batches_created_at", "created_at"),
        sa.Index("ix_batches_name_created_at", "name", "created_at"),
        sa.Index("ix_batches_owner_key", "owner", "key", unique=True, **_where("key IS NOT NULL")),
        # Which may have ended since somebody last looked, which ended long ago, and which are on their way out.
        sa.Index(
            "ix_batches_open",
            "accepted_at",
            **_where("accepted_at IS NOT NULL AND ended_at IS NULL AND deleted_at IS NULL"),
        ),
        sa.Index("ix_batches_ended_at", "ended_at", **_where("ended_at IS NOT NULL AND deleted_at IS NULL")),
        sa.Index("ix_batches_deleted_at", "deleted_at", **_where("deleted_at IS NOT NULL")),
    )


class OwnerRow(Base):
    """What is set for whoever submits; an owner without a row has what is written here."""

    __tablename__ = "owners"

    name: Mapped[str] = mapped_column(sa.String(200), primary_key=True)
    weight: Mapped[float] = mapped_column(default=1.0, server_default=sa.text("1"))
    """The part of the farm among owners of equal priority."""
    most_queued: Mapped[int | None]
    """How many jobs may lie in Redis at once; None means as many as the settings allow."""
    paused: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    virtual_time: Mapped[float] = mapped_column(default=0.0, server_default=sa.text("0"))
    """Device seconds served by weight."""


class JobRow(Base):
    """One spec to be rendered into one image. Only `JobStore` writes these."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(sa.String(100), primary_key=True)
    """`{batch}-{index}`: the Celery task's id too."""
    batch_id: Mapped[str] = mapped_column(sa.ForeignKey("batches.id", ondelete="CASCADE"))
    position: Mapped[int] = mapped_column("index")
    """Its place in the batch, from 1."""
    spec: Mapped[dict[str, Any]]
    model: Mapped[str] = mapped_column(sa.String(200))
    """The spec's, for the dispatcher's index."""
    state: Mapped[str] = mapped_column(sa.String(16), default=JobState.PENDING.value)
    priority: Mapped[int]
    """The batch's, for the dispatcher's index: 0 to 100, the higher the sooner."""
    not_before: Mapped[datetime | None]
    """Until then it stays in the backlog: the back-off after an error."""
    avoid_worker: Mapped[str | None] = mapped_column(sa.String(200))
    """Where it ran out of memory: another worker is to try it, if there is one."""
    paused: Mapped[bool] = mapped_column(default=False, server_default=sa.false())

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
    """The object from which the next attempt resumes. Workers before release 0.2 note leftovers here too, by an empty
    text."""
    leftovers: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    """Whether attempts may have left objects beside the picture, to be deleted once the job has ended."""
    preview_until: Mapped[datetime | None]
    """Until then somebody watches it, and its worker shows how it gets on."""
    preview_vae: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    """Whether previews are decoded by the VAE, and not roughly from the latents."""

    queued_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    error: Mapped[str | None] = mapped_column(sa.Text)
    """Why it failed, or why its last try did."""

    # The picture, for programs before release 0.2: they know no artifacts.
    image_key: Mapped[str | None] = mapped_column(sa.String(400))
    image_sha256: Mapped[str | None] = mapped_column(sa.String(64))
    image_bytes: Mapped[int | None]
    width: Mapped[int | None]
    height: Mapped[int | None]
    model_sha256: Mapped[str | None] = mapped_column(sa.String(64))
    render_seconds: Mapped[float | None]
    device_seconds: Mapped[float | None]
    """Its own part of the device's time."""
    charged_seconds: Mapped[float | None]
    """The device seconds charged to its batch and owner for its dispatch, until the charge is corrected."""
    work_sha256: Mapped[str | None] = mapped_column(sa.String(64))
    """Of spec and model name: who has the same one is the same work. None where that may not serve."""
    reused_from: Mapped[str | None] = mapped_column(sa.String(100))
    """The job whose picture this is a copy of."""
    warnings: Mapped[list[str] | None]

    artifacts: Mapped[list["ArtifactRow"]] = relationship(lazy="raise", viewonly=True)

    __table_args__ = (
        sa.UniqueConstraint("batch_id", "index"),
        # How far a batch is, and what ended since somebody last looked.
        sa.Index("ix_jobs_batch_id_state", "batch_id", "state"),
        sa.Index("ix_jobs_batch_id_finished_at", "batch_id", "finished_at"),
        sa.Index("ix_jobs_wrong", "batch_id", "index", **_where("error IS NOT NULL")),
        # The dispatcher's three questions, each over few rows: what is next, what is in Redis, whose lease ran out.
        sa.Index("ix_jobs_backlog", "model", "batch_id", "index", **_where("state = 'pending'")),
        sa.Index("ix_jobs_queued", "model", "queued_at", **_where("state = 'queued'")),
        sa.Index("ix_jobs_running", "lease_until", **_where("state = 'running'")),
        # The charges that can be corrected.
        sa.Index(
            "ix_jobs_charged",
            "batch_id",
            **_where("charged_seconds IS NOT NULL AND state NOT IN ('queued', 'running')"),
        ),
        # Who has done this work, and who is about to.
        sa.Index("ix_jobs_work_done", "work_sha256", **_where("state = 'succeeded' AND work_sha256 IS NOT NULL")),
        sa.Index(
            "ix_jobs_work_active",
            "work_sha256",
            **_where("state IN ('pending', 'queued', 'running') AND work_sha256 IS NOT NULL"),
        ),
        # Which jobs have leftovers to be deleted from the object store; the second, of workers before release 0.2.
        sa.Index("ix_jobs_leftovers", "finished_at", **_where("leftovers AND finished_at IS NOT NULL")),
        sa.Index(
            "ix_jobs_stale_checkpoints",
            "finished_at",
            **_where("checkpoint_key IS NOT NULL AND finished_at IS NOT NULL"),
        ),
        sa.CheckConstraint("state IN ({})".format(", ".join(f"'{state.value}'" for state in JobState)), name="state"),
    )


class AttemptRow(Base):
    """One attempt that ended, written with the move that ended it; the one under way is in its job's row."""

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
    """One object that a finished job has stored: its picture, or one beside it. Written with the job's success."""

    __tablename__ = "artifacts"

    job_id: Mapped[str] = mapped_column(sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    n: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Which of the job's artifacts of this role, from 0."""
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
    """How many jobs of a batch are in a state: the sum over the shards.

    Triggers on `jobs` keep it, so that it can't get out of step; a shard may be negative by itself. With shards,
    transactions that move jobs of one batch do not wait for each other.
    """

    __tablename__ = "job_counts"

    batch_id: Mapped[str] = mapped_column(sa.ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True)
    state: Mapped[str] = mapped_column(sa.String(16), primary_key=True)
    shard: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    n: Mapped[int] = mapped_column(sa.BigInteger)


class LeaderRow(Base):
    """Which of several processes acts, by what they are to do, and until when unless it renews that."""

    __tablename__ = "leaders"

    name: Mapped[str] = mapped_column(sa.String(100), primary_key=True)
    holder: Mapped[str] = mapped_column(sa.String(200))
    until: Mapped[datetime]


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
    """An entry for each model that it serves; `farm.jobs.served_models` writes and reads them."""
    memory_used: Mapped[int | None] = mapped_column(sa.BigInteger)
    """Bytes of its device's memory; NULL if unknown."""
    memory_total: Mapped[int | None] = mapped_column(sa.BigInteger)
    metrics_url: Mapped[str | None] = mapped_column(sa.Text)
    """Where Prometheus finds its metrics, if anywhere."""


class ReleaseRow(Base):
    """A step of the schema, noted by the migration to it, for programs that are older than it."""

    __tablename__ = "releases"

    revision: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    """Alembic's."""
    version: Mapped[str] = mapped_column(sa.String(40))
    """The farm's, which brought it."""
    serves_from: Mapped[str] = mapped_column(sa.String(32))
    """The oldest revision whose programs work with this one as well."""

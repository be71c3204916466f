"""When a batch ended, and what finds those that did, those on their way out, and a batch's jobs that went wrong."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


# Not as a batch: that may copy a table on SQLite, and the triggers and indexes on expressions would be lost with it.
# Batches that ended before are found like those that end from now on: each gets its manifest.
def upgrade() -> None:
    op.add_column("batches", sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True))
    _index(
        "ix_batches_open",
        "batches",
        ["accepted_at"],
        "accepted_at IS NOT NULL AND ended_at IS NULL AND deleted_at IS NULL",
    )
    _index("ix_batches_ended_at", "batches", ["ended_at"], "ended_at IS NOT NULL AND deleted_at IS NULL")
    _index("ix_batches_deleted_at", "batches", ["deleted_at"], "deleted_at IS NOT NULL")
    _index("ix_jobs_wrong", "jobs", ["batch_id", "index"], "error IS NOT NULL")


def _index(name: str, table: str, columns: list[str], where: str) -> None:
    clause = sa.text(where)
    op.create_index(name, table, columns, sqlite_where=clause, postgresql_where=clause)

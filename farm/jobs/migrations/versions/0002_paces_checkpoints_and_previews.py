"""A job's pace, its checkpoint, and who watches it."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

STALE = sa.text("checkpoint_key IS NOT NULL AND finished_at IS NOT NULL")


# Not as a batch: that may copy a table on SQLite, and the descending index of the backlog with it, ascending.
def upgrade() -> None:
    op.add_column("jobs", sa.Column("seconds_per_step", sa.Double(), nullable=True))
    op.add_column("jobs", sa.Column("checkpoint_key", sa.String(length=400), nullable=True))
    op.add_column("jobs", sa.Column("preview_until", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("preview_vae", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.create_index(
        "ix_jobs_stale_checkpoints", "jobs", ["finished_at"], unique=False, sqlite_where=STALE, postgresql_where=STALE
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_stale_checkpoints", "jobs")
    for column in ("preview_vae", "preview_until", "checkpoint_key", "seconds_per_step"):
        op.drop_column("jobs", column)

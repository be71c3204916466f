"""The objects that a finished job has stored, and whether its attempts may have left others."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None
serves_from = "0004"

LEFTOVERS = sa.text("leftovers AND finished_at IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "artifacts",
        sa.Column("job_id", sa.String(length=100), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("role", sa.String(length=40), nullable=False),
        sa.Column("key", sa.String(length=400), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("media_type", sa.String(length=100), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=True),
        sa.Column("width", sa.Integer(), nullable=True),
        sa.Column("height", sa.Integer(), nullable=True),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_artifacts_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "n", "role", name=op.f("pk_artifacts")),
    )
    op.add_column("jobs", sa.Column("leftovers", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.create_index(
        "ix_jobs_leftovers", "jobs", ["finished_at"], unique=False, sqlite_where=LEFTOVERS, postgresql_where=LEFTOVERS
    )

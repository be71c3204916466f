"""What a job was charged with when it was dispatched, until the charge is corrected."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None
serves_from = "0004"


# Not as a batch: that may copy a table on SQLite, and the triggers and indexes on expressions would be lost with it.
def upgrade() -> None:
    op.add_column("jobs", sa.Column("charged_seconds", sa.Double(), nullable=True))
    correctable = sa.text("charged_seconds IS NOT NULL AND state NOT IN ('queued', 'running')")
    op.create_index("ix_jobs_charged", "jobs", ["batch_id"], sqlite_where=correctable, postgresql_where=correctable)

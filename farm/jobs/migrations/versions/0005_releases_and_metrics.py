"""Which releases work with a schema, and where a worker's metrics are."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None
serves_from = "0004"


# Not as a batch: that may copy a table on SQLite, and the triggers and indexes on expressions would be lost with it.
def upgrade() -> None:
    op.create_table(
        "releases",
        sa.Column("revision", sa.String(length=32), nullable=False),
        sa.Column("version", sa.String(length=40), nullable=False),
        sa.Column("serves_from", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("revision", name=op.f("pk_releases")),
    )
    op.add_column("workers", sa.Column("metrics_url", sa.Text(), nullable=True))

"""The memory of a worker's device in columns of its own."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None
serves_from = "0004"


def upgrade() -> None:
    op.add_column("workers", sa.Column("memory_used", sa.BigInteger(), nullable=True))
    op.add_column("workers", sa.Column("memory_total", sa.BigInteger(), nullable=True))

"""What became of each attempt, what is set for owners, how many jobs are in each state, and who leads."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


# Not as a batch: that may copy a table on SQLite, and the triggers and indexes on expressions would be lost with it.
def upgrade() -> None:
    op.create_table(
        "owners",
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("weight", sa.Double(), server_default=sa.text("1"), nullable=False),
        sa.Column("most_queued", sa.Integer(), nullable=True),
        sa.Column("paused", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("virtual_time", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_owners")),
    )
    op.create_table(
        "leaders",
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("holder", sa.String(length=200), nullable=False),
        sa.Column("until", TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_leaders")),
    )
    op.create_table(
        "attempts",
        sa.Column("job_id", sa.String(length=100), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(length=200), nullable=True),
        sa.Column("started_at", TIME, nullable=True),
        sa.Column("ended_at", TIME, nullable=False),
        sa.Column("outcome", sa.String(length=20), nullable=False),
        sa.Column("error_class", sa.String(length=20), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("steps_done", sa.Integer(), nullable=False),
        sa.Column("device_seconds", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_attempts_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "attempt", name=op.f("pk_attempts")),
    )
    op.create_table(
        "job_counts",
        sa.Column("batch_id", sa.String(length=80), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("shard", sa.Integer(), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("fk_job_counts_batch_id_batches"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("batch_id", "state", "shard", name=op.f("pk_job_counts")),
    )
    _extend_batches()
    _extend_jobs()
    op.execute("INSERT INTO job_counts SELECT batch_id, state, 0, count(*) FROM jobs GROUP BY batch_id, state")
    for statement in _SQLITE if op.get_bind().dialect.name == "sqlite" else _POSTGRESQL:
        op.execute(statement)


def _extend_batches() -> None:
    op.add_column("batches", sa.Column("accepted_at", TIME, nullable=True))
    op.add_column("batches", sa.Column("key", sa.String(length=200), nullable=True))
    op.add_column("batches", sa.Column("content_sha256", sa.String(length=64), nullable=True))
    op.add_column("batches", sa.Column("paused", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("batches", sa.Column("weight", sa.Double(), server_default=sa.text("1"), nullable=False))
    op.add_column("batches", sa.Column("virtual_time", sa.Double(), server_default=sa.text("0"), nullable=False))
    op.add_column("batches", sa.Column("reuse", sa.Boolean(), server_default=sa.true(), nullable=False))
    op.add_column("batches", sa.Column("deleted_at", TIME, nullable=True))
    _index("ix_batches_owner_key", "batches", ["owner", "key"], "key IS NOT NULL", unique=True)
    op.execute("UPDATE batches SET accepted_at = created_at")


def _extend_jobs() -> None:
    op.drop_index("ix_jobs_backlog", "jobs")
    op.drop_index("ix_jobs_backlog_rank", "jobs")
    op.drop_column("jobs", "rank")
    op.add_column("jobs", sa.Column("not_before", TIME, nullable=True))
    op.add_column("jobs", sa.Column("avoid_worker", sa.String(length=200), nullable=True))
    op.add_column("jobs", sa.Column("paused", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("jobs", sa.Column("device_seconds", sa.Double(), nullable=True))
    op.add_column("jobs", sa.Column("work_sha256", sa.String(length=64), nullable=True))
    op.add_column("jobs", sa.Column("reused_from", sa.String(length=100), nullable=True))
    _index("ix_jobs_backlog", "jobs", ["model", "batch_id", "index"], "state = 'pending'")
    _index("ix_jobs_work_done", "jobs", ["work_sha256"], "state = 'succeeded' AND work_sha256 IS NOT NULL")
    active = "state IN ('pending', 'queued', 'running') AND work_sha256 IS NOT NULL"
    _index("ix_jobs_work_active", "jobs", ["work_sha256"], active)


def _index(name: str, table: str, columns: list[str], where: str, *, unique: bool = False) -> None:
    clause = sa.text(where)
    op.create_index(name, table, columns, unique=unique, sqlite_where=clause, postgresql_where=clause)


# Who deletes a batch deletes its jobs after it: there is nothing left to count then.
_SQLITE = (
    """
    CREATE TRIGGER jobs_counted_in AFTER INSERT ON jobs BEGIN
        INSERT INTO job_counts (batch_id, state, shard, n) VALUES (NEW.batch_id, NEW.state, 0, 1)
        ON CONFLICT (batch_id, state, shard) DO UPDATE SET n = n + 1;
    END
    """,
    """
    CREATE TRIGGER jobs_counted_over AFTER UPDATE OF state ON jobs WHEN NEW.state <> OLD.state BEGIN
        UPDATE job_counts SET n = n - 1 WHERE batch_id = OLD.batch_id AND state = OLD.state AND shard = 0;
        INSERT INTO job_counts (batch_id, state, shard, n) VALUES (NEW.batch_id, NEW.state, 0, 1)
        ON CONFLICT (batch_id, state, shard) DO UPDATE SET n = n + 1;
    END
    """,
    """
    CREATE TRIGGER jobs_counted_out AFTER DELETE ON jobs BEGIN
        UPDATE job_counts SET n = n - 1 WHERE batch_id = OLD.batch_id AND state = OLD.state AND shard = 0;
    END
    """,
)

# Once a statement, however many rows it moves. The rows of a statement are added to in one order, and those of
# different connections lie in different shards: so nobody waits long, and no two wait for each other.
_POSTGRESQL = (
    """
    CREATE FUNCTION count_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP = 'INSERT' THEN
            INSERT INTO job_counts (batch_id, state, shard, n)
            SELECT batch_id, state, pg_backend_pid() % 32, count(*) FROM after
            GROUP BY batch_id, state ORDER BY batch_id, state
            ON CONFLICT (batch_id, state, shard) DO UPDATE SET n = job_counts.n + excluded.n;
        ELSIF TG_OP = 'UPDATE' THEN
            INSERT INTO job_counts (batch_id, state, shard, n)
            SELECT batch_id, state, pg_backend_pid() % 32, sum(by) FROM (
                SELECT batch_id, state, -1 AS by FROM before UNION ALL SELECT batch_id, state, 1 FROM after
            ) AS moved
            GROUP BY batch_id, state HAVING sum(by) <> 0 ORDER BY batch_id, state
            ON CONFLICT (batch_id, state, shard) DO UPDATE SET n = job_counts.n + excluded.n;
        ELSE
            INSERT INTO job_counts (batch_id, state, shard, n)
            SELECT batch_id, state, pg_backend_pid() % 32, -count(*) FROM before
            WHERE EXISTS (SELECT FROM batches WHERE batches.id = before.batch_id)
            GROUP BY batch_id, state ORDER BY batch_id, state
            ON CONFLICT (batch_id, state, shard) DO UPDATE SET n = job_counts.n + excluded.n;
        END IF;
        RETURN NULL;
    END
    $$
    """,
    """
    CREATE TRIGGER jobs_counted_in AFTER INSERT ON jobs
    REFERENCING NEW TABLE AS after FOR EACH STATEMENT EXECUTE FUNCTION count_jobs()
    """,
    """
    CREATE TRIGGER jobs_counted_over AFTER UPDATE ON jobs
    REFERENCING OLD TABLE AS before NEW TABLE AS after FOR EACH STATEMENT EXECUTE FUNCTION count_jobs()
    """,
    """
    CREATE TRIGGER jobs_counted_out AFTER DELETE ON jobs
    REFERENCING OLD TABLE AS before FOR EACH STATEMENT EXECUTE FUNCTION count_jobs()
    """,
)

"""Migrations produce the declared schema, and the most frequent queries use indexes."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from farm import __version__
from farm.errors import DatabaseUnavailable, NotConfigured, SchemaMismatch
from farm.jobs.charges import CORRECTABLE
from farm.jobs.conditions import VISIBLE, in_state
from farm.jobs.database import Database, _alembic, at_commit, now, now_plus
from farm.jobs.leftovers import STALE, STALE_OF_OLD_WORKERS
from farm.jobs.records import Pace
from farm.jobs.schema import Base, BatchRow, JobCountRow, JobRow, ReleaseRow
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.spec import RenderSpec


def test_the_migrated_schema_is_the_declared_one(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        found = compare_metadata(context, Base.metadata)
    assert found == []


def test_migrating_twice_is_harmless(database: Database) -> None:
    database.migrate()
    database.check_schema()


@pytest.mark.parametrize("revision", ["0001", "0002"])
def test_jobs_of_an_older_schema_are_rendered_by_this_one(database: Database, revision: str) -> None:
    store = JobStore.over(database, Settings(database_url="", broker_url="", s3_bucket=""))
    go_back(database, revision)
    with database.write() as session:
        session.execute(sa.text("INSERT INTO batches VALUES ('old', 'old', 'me', 50, 3, '2026-01-01 00:00:00.000000')"))
        # Jobs are written as they were before specs had more fields.
        session.execute(
            sa.text("""
                INSERT INTO jobs (id, batch_id, "index", spec, model, state, priority, rank, attempt, tries,
                                  lost_leases, cancel_requested, steps_done)
                VALUES ('old-1', 'old', 1, '{"prompt": "a", "seed": 1}', 'tiny', 'failed', 50, 1, 0, 0, 0, false, 0),
                       ('old-2', 'old', 2, '{"prompt": "b", "seed": 1}', 'tiny', 'pending', 50, 2, 0, 0, 0, false, 0),
                       ('old-3', 'old', 3, '{"prompt": "c", "seed": 1}', 'tiny', 'pending', 50, 3, 0, 0, 0, false, 0)
            """)
        )
    with pytest.raises(SchemaMismatch):
        database.check_schema()
    database.migrate()
    database.check_schema()
    assert counted(database) == {"old": {"failed": 1, "pending": 2}}
    assert [bell.job_id for bell in store.backlog.enqueue(1).queued] == ["old-2"]
    claim = store.leases.claim("old-2", "w1@host")
    assert claim is not None
    assert (claim.spec, claim.checkpoint_key) == (RenderSpec(prompt="b", seed=1), None)
    assert store.leases.beat("w1@host", {("old-2", 1): Pace(1, 0.1)}).previews == {}
    assert counted(database) == {"old": {"failed": 1, "pending": 1, "running": 1}}


def go_back(database: Database, revision: str) -> None:
    """Replace the schema by an empty one of that revision."""
    with database.write() as session:
        Base.metadata.drop_all(session.connection())
        session.execute(sa.text("DROP TABLE alembic_version"))
        if database.engine.dialect.name == "postgresql":
            session.execute(sa.text("DROP FUNCTION count_jobs"))
    with database.engine.connect() as connection:
        config = _alembic()
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        connection.commit()


def counted(database: Database) -> dict[str, dict[str, int]]:
    """Return the triggers' counts by batch and state, after checking them against the jobs themselves."""
    kept = sa.select(JobCountRow.batch_id, JobCountRow.state, sa.func.sum(JobCountRow.n)).group_by(
        JobCountRow.batch_id, JobCountRow.state
    )
    there = sa.select(JobRow.batch_id, JobRow.state, sa.func.count()).group_by(JobRow.batch_id, JobRow.state)
    with database.read() as session:
        rows = sorted((batch_id, state, int(n)) for batch_id, state, n in session.execute(kept) if n)
        assert rows == sorted((batch_id, state, n) for batch_id, state, n in session.execute(there))
    counts: dict[str, dict[str, int]] = {}
    for batch_id, state, n in rows:
        counts.setdefault(batch_id, {})[state] = n
    return counts


def test_the_jobs_in_each_state_are_counted_whatever_moves_them(database: Database) -> None:
    store = JobStore.over(database, Settings(database_url="", broker_url="", s3_bucket=""))
    first = store.submissions.submit("first", "me", 50, [RenderSpec(prompt=str(n)) for n in range(1500)])
    second = store.submissions.submit("second", "me", 40, [RenderSpec(prompt=str(n)) for n in range(3)])
    with ThreadPoolExecutor(4) as pool:  # on PostgreSQL with several connections, which count in shards of their own
        claims = list(
            pool.map(lambda bell: store.leases.claim(bell.job_id, "w1@host"), store.backlog.enqueue(20).queued)
        )
    assert None not in claims
    store.steering.cancel(job_id=f"{first}-30")
    assert counted(database) == {
        first: {"pending": 1479, "running": 20, "cancelled": 1},
        second: {"pending": 3},
    }
    with database.write() as session:
        session.execute(sa.delete(JobRow).where(JobRow.batch_id == first, JobRow.position > 1000))
    assert counted(database)[first] == {"pending": 979, "running": 20, "cancelled": 1}
    with database.write() as session:
        session.execute(sa.delete(BatchRow).where(BatchRow.id == first))
    assert counted(database) == {second: {"pending": 3}}
    with database.read() as session:
        assert not session.scalar(sa.select(sa.func.count()).where(JobCountRow.batch_id == first))


def test_what_is_undone_is_not_counted(database: Database) -> None:
    store = JobStore.over(database, Settings(database_url="", broker_url="", s3_bucket=""))
    batch_id = store.submissions.submit("batch", "me", 50, [RenderSpec(prompt="a")])

    def cancel_and_fail() -> None:
        with database.write() as session:
            session.execute(sa.update(JobRow).values(state=JobState.CANCELLED.value))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cancel_and_fail()
    assert counted(database) == {batch_id: {"pending": 1}}


def test_there_is_one_head() -> None:
    assert len(ScriptDirectory.from_config(_alembic()).get_heads()) == 1


def test_each_migration_says_which_programs_its_schema_serves(database: Database) -> None:
    scripts = [
        script for script in ScriptDirectory.from_config(_alembic()).walk_revisions() if script.revision > "0004"
    ]
    with database.read() as session:
        noted = {row.revision: (row.version, row.serves_from) for row in session.scalars(sa.select(ReleaseRow))}
    assert noted == {script.revision: (__version__, script.module.serves_from) for script in scripts}
    # Revisions are compared as text.
    assert all(len(text) == 4 for script in scripts for text in (script.revision, script.module.serves_from))


def move_on(database: Database, serves_from: str) -> None:
    """Change the schema's recorded revision as a later version's migration would."""
    with database.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
        session.add(ReleaseRow(revision="9999", version="9.9", serves_from=serves_from))


def test_a_newer_schema_that_serves_this_version_is_worked_with(database: Database) -> None:
    move_on(database, serves_from="0005")
    database.check_schema()
    database.migrate()
    with database.read() as session:
        assert session.scalar(sa.text("SELECT version_num FROM alembic_version")) == "9999"


def test_a_newer_schema_that_no_longer_serves_this_version_is_refused_with_what_to_install(database: Database) -> None:
    move_on(database, serves_from="9998")
    for refused in (database.check_schema, database.migrate):
        with pytest.raises(SchemaMismatch, match=rf"9\.9.*farm {__version__} .*pip install 'diffusion-farm==9\.9'"):
            refused()


def test_an_older_schema_asks_for_a_migration_first(database: Database) -> None:
    go_back(database, "0004")
    with pytest.raises(SchemaMismatch, match=r"is 0004, and farm .* needs .*: run `farm migrate`"):
        database.check_schema()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_migration_that_waits_for_a_long_reader_does_not_block_others(database: Database) -> None:
    go_back(database, "0004")
    count = sa.text("SELECT count(*) FROM workers")  # the next migration adds a column to this table
    with ThreadPoolExecutor(1) as pool:
        # A connection from outside the farm: the farm's own connections may not be idle in a transaction for so long.
        with sa.create_engine(database.url, poolclass=sa.NullPool).connect() as backup:
            backup.execute(count)
            migrated = pool.submit(database.migrate)
            start, slowest = time.monotonic(), 0.0
            while (passed := time.monotonic() - start) < 5 or (slowest < 0.5 and passed < 60):
                began = time.monotonic()
                with database.read() as session:
                    session.execute(count)
                slowest = max(slowest, time.monotonic() - began)
            assert not migrated.done()
            assert 0.5 < slowest < 30, "it tries, and gives way"
        migrated.result(30)
    database.check_schema()


def test_a_migration_waits_for_a_writer(database: Database) -> None:
    go_back(database, "0004")
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            session.execute(sa.text("INSERT INTO owners (name) VALUES ('somebody')"))
            migrated = pool.submit(database.migrate)
            if database.engine.dialect.name == "sqlite":  # SQLite has one writer, so the migration waits
                with pytest.raises(TimeoutError):
                    migrated.result(0.3)
        migrated.result(30)
    database.check_schema()


def test_a_database_without_a_schema_or_of_another_version_is_refused(database: Database) -> None:
    with database.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = 'other'"))
    with pytest.raises(SchemaMismatch, match="other"):
        database.check_schema()
    with database.write() as session:
        session.execute(sa.text("DELETE FROM alembic_version"))
    with pytest.raises(SchemaMismatch, match="farm migrate"):
        database.check_schema()


@pytest.mark.parametrize(
    ("index", "query"),
    [
        (
            "ix_jobs_backlog",
            sa.select(JobRow.id)
            .where(in_state(JobState.PENDING), JobRow.model == "tiny", JobRow.batch_id == "b")
            .order_by(JobRow.position)
            .limit(10),
        ),
        (
            "ix_jobs_work_done",
            sa.select(JobRow.id).where(in_state(JobState.SUCCEEDED), JobRow.work_sha256 == "e").limit(1),
        ),
        (
            "ix_jobs_work_active",
            sa.select(JobRow.id)
            .where(sa.text("state IN ('pending', 'queued', 'running')"), JobRow.work_sha256 == "e")
            .limit(1),
        ),
        ("ix_jobs_queued", sa.select(sa.func.count()).where(in_state(JobState.QUEUED), JobRow.model == "tiny")),
        ("ix_jobs_running", sa.select(JobRow.id).where(in_state(JobState.RUNNING), JobRow.lease_until < now())),
        (
            "ix_jobs_batch_id_state",
            sa.select(JobRow.state, sa.func.count()).where(JobRow.batch_id == "b").group_by(JobRow.state),
        ),
        (
            "ix_jobs_batch_id_finished_at",
            sa.select(JobRow.id)
            .where(JobRow.batch_id == "b", JobRow.finished_at >= now())
            .order_by(JobRow.finished_at),
        ),
        (
            "ix_jobs_wrong",
            sa.select(JobRow.id)
            .where(JobRow.batch_id == "b", JobRow.error.is_not(None))
            .order_by(JobRow.position)
            .limit(10),
        ),
        (
            "ix_batches_open",
            sa.select(BatchRow.id).where(VISIBLE, BatchRow.ended_at.is_(None)).order_by(BatchRow.accepted_at).limit(10),
        ),
        (
            "ix_batches_ended_at",
            sa.select(BatchRow.id)
            .where(BatchRow.ended_at < now(), BatchRow.deleted_at.is_(None))
            .order_by(BatchRow.ended_at)
            .limit(10),
        ),
        (
            "ix_batches_deleted_at",
            sa.select(BatchRow.id).where(BatchRow.deleted_at.is_not(None)).order_by(BatchRow.deleted_at).limit(10),
        ),
        ("ix_jobs_charged", sa.select(JobRow.id).where(CORRECTABLE).limit(10)),
        (
            "ix_jobs_stale_checkpoints",
            sa.select(JobRow.id).where(*STALE_OF_OLD_WORKERS).order_by(JobRow.finished_at).limit(10),
        ),
        (
            "ix_jobs_leftovers",
            sa.select(JobRow.id).where(*STALE).order_by(JobRow.finished_at).limit(10),
        ),
    ],
)
def test_an_index_serves_the_question(database: Database, index: str, query: sa.Select[tuple[object]]) -> None:
    with database.read() as session:
        if database.engine.dialect.name == "postgresql":
            # PostgreSQL always scans an empty table; the test checks only that the index can answer the query.
            session.execute(sa.text("SET LOCAL enable_seqscan = off"))
            session.execute(sa.text("SET LOCAL enable_bitmapscan = off"))
            session.execute(sa.text("SET LOCAL enable_sort = off"))
        explain = "EXPLAIN" if database.engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN"
        statement = query.compile(database.engine, compile_kwargs={"literal_binds": True})
        rows = session.execute(sa.text(f"{explain} {statement}"))
        plan = "\n".join(str(row) for row in rows)
    assert index in plan, plan
    assert "TEMP B-TREE" not in plan


def test_a_transaction_that_fails_changes_nothing(database: Database) -> None:
    def fail() -> None:
        with database.write() as session:
            session.execute(sa.text("UPDATE alembic_version SET version_num = 'x'"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    database.check_schema()


def test_what_follows_a_commit_does_not_follow_a_transaction_that_failed(database: Database) -> None:
    called: list[str] = []

    def fail() -> None:
        with database.write() as session:
            at_commit(session, lambda: called.append("failed"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with database.write() as session:
        at_commit(session, lambda: called.append("committed"))
        assert called == []
    assert called == ["committed"]


def test_the_databases_clock_is_utc_and_adds_seconds(database: Database) -> None:
    with database.read() as session:
        here, later = session.execute(sa.select(now(), now_plus(sa.literal(90.5)))).one()
    assert abs((datetime.now(UTC) - here).total_seconds()) < 5
    assert abs((later - here).total_seconds() - 90.5) < 0.1


def test_a_database_that_is_not_there_is_unavailable() -> None:
    database = Database("postgresql://u:secret@127.0.0.1:1/x")
    with pytest.raises(DatabaseUnavailable) as caught, database.read() as session:
        session.execute(sa.text("SELECT 1"))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["nonsense", "mysql://u@h/x", "postgresql+nodriver://h/x"])
def test_a_url_that_can_not_be_used_is_said_so(url: str) -> None:
    with pytest.raises(NotConfigured, match="FARM_DATABASE_URL"):
        Database(url)

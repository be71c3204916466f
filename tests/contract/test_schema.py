"""The migrated schema is the declared one, and the questions asked most are answered from indexes."""

import warnings
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from farm.db import Base, Database, JobRow, _alembic, now, now_plus
from farm.errors import DatabaseUnavailable, NotConfigured, SchemaMismatch
from farm.jobs import JobStore
from farm.queries import STALE, in_state
from farm.records import Pace
from farm.settings import Settings
from farm.spec import RenderSpec
from farm.states import JobState


def test_the_migrated_schema_is_the_declared_one(database: Database) -> None:
    with database.engine.connect() as connection, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*expression-based index", category=UserWarning)
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        found = compare_metadata(context, Base.metadata)
    # Alembic can't compare an index with a descending column; that it is there and serves, its query plan shows.
    assert [change for change in found if getattr(change[1], "name", "") != "ix_jobs_backlog"] == []


def test_migrating_twice_is_harmless(database: Database) -> None:
    database.migrate()
    database.check_schema()


def test_jobs_of_an_older_schema_are_rendered_by_this_one(database: Database) -> None:
    settings = Settings(database_url="", broker_url="", s3_bucket="")
    store = JobStore(database, settings)
    batch_id = store.submit("old", "me", 50, [RenderSpec(prompt="old")])
    with database.engine.connect() as connection:
        config = _alembic()
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
        connection.commit()
    # As it was written before there were more fields.
    with database.write() as session:
        session.execute(sa.text("""UPDATE jobs SET spec = '{"prompt": "old", "seed": 1}'"""))
    with pytest.raises(SchemaMismatch):
        database.check_schema()
    database.migrate()
    database.check_schema()
    assert store.enqueue(1)
    claim = store.claim(f"{batch_id}-1", "w1@host")
    assert claim is not None
    assert (claim.spec, claim.checkpoint_key) == (RenderSpec(prompt="old", seed=1), None)
    assert store.beat("w1@host", {(claim.job_id, 1): Pace(1, 0.1)}).previews == {}


def test_there_is_one_head() -> None:
    assert len(ScriptDirectory.from_config(_alembic()).get_heads()) == 1


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
            .where(in_state(JobState.PENDING), JobRow.model == "tiny")
            .order_by(JobRow.priority.desc(), JobRow.rank, JobRow.id)
            .limit(10),
        ),
        ("ix_jobs_backlog_rank", sa.select(sa.func.min(JobRow.rank)).where(in_state(JobState.PENDING))),
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
            "ix_jobs_stale_checkpoints",
            sa.select(JobRow.id).where(*STALE).order_by(JobRow.finished_at).limit(10),
        ),
    ],
)
def test_an_index_serves_the_question(database: Database, index: str, query: sa.Select[tuple[object]]) -> None:
    with database.read() as session:
        if database.engine.dialect.name == "postgresql":
            # An empty table is scanned whatever there is; what counts is that the index can serve.
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

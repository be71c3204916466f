"""The demand by model on both databases, and the same number in plain SQL, for an autoscaler."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from farm.jobs.database import Database
from farm.jobs.demand import Demand, demands
from farm.jobs.records import Picture, WorkerInfo
from farm.jobs.served_models import ServedModel
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.spec import RenderSpec

SQL = (Path(__file__).parents[2] / "infra" / "keda" / "device_seconds.sql").read_text()
LEASE = 10.0


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore.over(database, Settings(database_url="sqlite://", broker_url="", s3_bucket=""))


def asked(database: Database) -> dict[str, Demand]:
    return dict(demands(database, LEASE).models)


def specs(count: int, *models: str) -> Iterator[RenderSpec]:
    return (RenderSpec(prompt="x", seed=n, model=models[n % len(models)]) for n in range(count))


def render(store: JobStore, *job_ids: str, seconds: float) -> None:
    for job_id in job_ids:
        claim = store.leases.claim(job_id, "w1")
        assert claim is not None
        picture = Picture(f"{job_id}.png", "a" * 64, 1, 8, 8, "b" * 64, 9 * seconds, device_seconds=seconds)
        assert store.attempts.succeed(claim, picture)


def by_sql(database: Database, model: str) -> float:
    """Return the demand by KEDA's query, which works on SQLite too, although KEDA itself can't read SQLite."""
    with database.read() as session:
        found = session.execute(sa.text(SQL), {"model": model}).one()
    return float(found[0])


def test_jobs_are_counted_by_state_and_model_where_a_batch_has_several_too(database: Database, store: JobStore) -> None:
    store.submissions.submit("one", "me", 50, specs(5, "tiny"))
    store.submissions.submit("both", "me", 50, specs(6, "tiny", "other"))
    bells = store.backlog.enqueue(2).queued
    claim = store.leases.claim(next(bell.job_id for bell in bells if bell.model == "other"), "w1")
    assert claim is not None
    found = demands(database, LEASE)
    assert found.jobs[JobState.PENDING] + found.jobs[JobState.QUEUED] + found.jobs[JobState.RUNNING] == 11
    jobs = {model: demand.jobs for model, demand in found.models.items()}
    assert jobs["tiny"] == {JobState.PENDING: 6, JobState.QUEUED: 2}
    assert jobs["other"] == {JobState.PENDING: 1, JobState.QUEUED: 1, JobState.RUNNING: 1}
    assert (by_sql(database, "tiny"), by_sql(database, "other")) == (8, 3)  # one second per job


def test_what_waits_costs_what_its_batch_took_or_else_its_model_or_else_a_second(
    database: Database, store: JobStore
) -> None:
    measured = store.submissions.submit("measured", "me", 50, specs(10, "tiny"))
    store.backlog.enqueue(4)
    render(store, f"{measured}-1", f"{measured}-2", seconds=3.0)
    assert asked(database)["tiny"].queued_seconds == pytest.approx(8 * 3.0)
    store.submissions.submit("new", "me", 50, specs(5, "tiny"))
    store.submissions.submit("unknown", "me", 50, specs(7, "other"))
    found = asked(database)
    assert found["tiny"].queued_seconds == pytest.approx(13 * 3.0)
    assert found["other"].queued_seconds == pytest.approx(7.0)
    assert store.leases.claim(f"{measured}-3", "w1") is not None
    found = asked(database)
    assert (found["tiny"].queued_seconds, found["tiny"].running_seconds) == (pytest.approx(36.0), pytest.approx(3.0))
    for model, demand in found.items():
        assert by_sql(database, model) == pytest.approx(demand.queued_seconds + demand.running_seconds)


def test_copies_failures_and_jobs_of_other_models_say_nothing_of_what_one_costs(
    database: Database, store: JobStore
) -> None:
    batch = store.submissions.submit("mixed", "me", 50, specs(40, "tiny", "other"))
    store.backlog.enqueue(40)
    render(store, f"{batch}-1", seconds=2.0)
    render(store, f"{batch}-2", seconds=50.0)
    with database.write() as session:
        session.execute(sa.text("UPDATE jobs SET reused_from = 'x' WHERE id = :id"), {"id": f"{batch}-2"})
    claim = store.leases.claim(f"{batch}-3", "w1")
    assert claim is not None
    assert store.attempts.fail(claim, "why not")
    found = asked(database)
    assert found["tiny"].queued_seconds == pytest.approx(19 * 2.0)
    assert found["other"].queued_seconds == pytest.approx(19.0)
    assert by_sql(database, "other") == pytest.approx(19.0)


@pytest.mark.parametrize("whose", ["batch", "owner"])
def test_paused_jobs_are_no_demand_for_a_device(database: Database, store: JobStore, whose: str) -> None:
    batch = store.submissions.submit("paused", "me", 50, specs(5, "tiny"))
    which = {"batch_id": batch} if whose == "batch" else {"owner": "me"}
    store.steering.pause(**which)
    found = asked(database)["tiny"]
    assert (found.jobs[JobState.PENDING], found.held_up, found.queued_seconds) == (5, 5, 0)
    assert found.waits_since is None
    assert by_sql(database, "tiny") == 0
    store.steering.resume(**which)
    found = asked(database)["tiny"]
    assert (found.held_up, found.queued_seconds) == (0, 5.0)
    assert found.waits_since is not None


def test_what_is_deleted_or_not_there_yet_does_not_count(database: Database, store: JobStore) -> None:
    batch = store.submissions.submit("gone", "me", 50, specs(5, "tiny"))
    store.deletions.mark(batch, cancel=True)

    def broken() -> Iterator[RenderSpec]:
        yield from specs(1500, "tiny")
        found = demands(database, LEASE)
        assert found.models.get("tiny", Demand()).queued_seconds == 0
        assert sum(found.jobs.values()) == 0
        raise KeyError

    with pytest.raises(KeyError):
        store.submissions.submit("broken", "me", 50, broken())
    assert by_sql(database, "tiny") == 0


def test_workers_of_a_model_are_counted_without_waiting_jobs_too(database: Database, store: JobStore) -> None:
    for number in (1, 2):
        store.workers.register(
            WorkerInfo(f"w{number}@host", "cpu", "float32", 4, "1", [ServedModel("tiny"), ServedModel(f"own{number}")])
        )
    found = demands(database, LEASE)
    assert found.workers == 2
    assert {model: (one.workers, one.slots) for model, one in found.models.items()} == {
        "tiny": (2, 8),
        "own1": (1, 4),
        "own2": (1, 4),
    }
    assert {model: one.workers for model, one in demands(database, 0.0).models.items()} == {}


def test_it_asks_no_more_often_for_more_jobs(database: Database, store: JobStore) -> None:
    asked_for: list[str] = []
    sa.event.listen(database.engine, "before_cursor_execute", lambda *given: asked_for.append(given[2]))
    store.submissions.submit("few", "me", 50, specs(3, "tiny"))
    asked_for.clear()
    demands(database, LEASE)
    few = len(asked_for)
    store.submissions.submit("many", "me", 50, specs(3000, "tiny"))
    asked_for.clear()
    demands(database, LEASE)
    assert len(asked_for) == few

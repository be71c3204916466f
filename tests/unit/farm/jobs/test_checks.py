"""The doctor's findings about the database, the dispatcher and the workers, as recorded in SQL."""

import os
import socket
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

from farm import __version__
from farm.jobs.checks import TAKEOVER_SECONDS, check_database, check_dispatcher, check_workers
from farm.jobs.database import Database, now_plus
from farm.jobs.leadership import DISPATCHER, Leadership
from farm.jobs.records import WorkerInfo
from farm.jobs.schema import JobRow, LeaderRow, WorkerRow
from farm.jobs.served_models import ServedModel
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.runtime.finding import Finding
from farm.settings import Settings
from farm.specs.spec import RenderSpec

SETTINGS = Settings(database_url="", broker_url="", s3_bucket="", lease_seconds=600.0)
NO_WORKER = Finding("worker", "bad", "none is alive", "start one: `farm worker`")


class Clock:
    """A clock that only `sleep` advances."""

    def __init__(self, during: Callable[[float], None] = lambda _: None) -> None:
        self.seconds = 0.0
        self._during = during

    def __call__(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.seconds += seconds
        self._during(self.seconds)


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    database = Database(sqlite_url)
    yield database
    database.close()


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore.over(database, SETTINGS)


def lead(database: Database) -> Leadership:
    leadership = Leadership(database, DISPATCHER, lease_seconds=600)
    assert leadership.seek()
    return leadership


def lease_ends_in(database: Database, seconds: float) -> None:
    """Set the end of the leader's lease, instead of waiting for it."""
    with database.write() as session:
        session.execute(sa.update(LeaderRow).values(until=now_plus(sa.literal(seconds))))


def introduce(
    store: JobStore, name: str, *models: str, version: str = __version__, database: Database | None = None
) -> None:
    """Register a worker; with `database`, its last heartbeat is longer ago than a lease."""
    served = tuple(ServedModel(model) for model in models or ("tiny",))
    store.workers.register(WorkerInfo(name, "cpu", "float32", 8, version, served))
    if database is not None:
        silent = now_plus(sa.literal(-SETTINGS.lease_seconds - 60))
        with database.write() as session:
            session.execute(sa.update(WorkerRow).where(WorkerRow.name == name).values(seen_at=silent))


def submit(store: JobStore, count: int, model: str) -> str:
    specs = [RenderSpec(prompt="a boat", seed=seed, model=model) for seed in range(count)]
    return store.submissions.submit("batch", "me", 50, specs)


def workers_said(database: Database) -> list[Finding]:
    return list(check_workers(database, SETTINGS))


# --- the database --------------------------------------------------------------------------------------------------


def test_a_migrated_database_is_fine(database: Database) -> None:
    finding = check_database(database)
    assert (finding.level, finding.do) == ("ok", "")
    assert finding.what.startswith(database.shown)


def test_a_database_without_a_schema_is_to_be_migrated() -> None:
    empty = Database("sqlite://")
    finding = check_database(empty)
    empty.close()
    assert finding.level == "bad"
    assert "farm migrate" in finding.what + finding.do


def test_a_database_of_which_nobody_can_make_a_file_is_named_with_its_setting() -> None:
    nowhere = Database("sqlite:////proc/nowhere/farm.db")
    finding = check_database(nowhere)
    nowhere.close()
    assert (finding.level, finding.do) == ("bad", "start it, or correct FARM_DATABASE_URL")


# --- the dispatcher ------------------------------------------------------------------------------------------------


def test_a_dispatcher_that_leads_is_named_without_a_wait(database: Database) -> None:
    lead(database)
    clock = Clock()
    finding = check_dispatcher(database, "start one", clock=clock, sleep=clock.sleep)
    assert finding == Finding("dispatcher", "ok", f"runs on {socket.gethostname()} as process {os.getpid()}")
    assert clock.seconds == 0


def test_without_a_dispatcher_the_remedy_is_said_after_the_time_of_a_takeover(database: Database) -> None:
    clock = Clock()
    finding = check_dispatcher(database, "start one", clock=clock, sleep=clock.sleep)
    assert finding == Finding("dispatcher", "bad", "does not run", "start one")
    assert clock.seconds == pytest.approx(TAKEOVER_SECONDS, abs=0.2)


def test_a_dispatcher_whose_lease_has_run_out_does_not_run(database: Database) -> None:
    lead(database)
    lease_ends_in(database, -1.0)
    clock = Clock()
    assert check_dispatcher(database, "start one", clock=clock, sleep=clock.sleep).level == "bad"


def test_a_dispatcher_whose_lease_has_just_run_out_is_found_if_it_renews_it_meanwhile(database: Database) -> None:
    leadership = lead(database)
    lease_ends_in(database, -1.0)
    clock = Clock(lambda seconds: leadership.seek() and None if seconds > TAKEOVER_SECONDS / 2 else None)
    assert check_dispatcher(database, "start one", clock=clock, sleep=clock.sleep).level == "ok"


def test_another_dispatcher_that_takes_over_meanwhile_is_found(database: Database) -> None:
    lead(database).resign()

    def take_over(seconds: float) -> None:
        if seconds > TAKEOVER_SECONDS / 2:
            lead(database)

    clock = Clock(take_over)
    assert check_dispatcher(database, "start one", clock=clock, sleep=clock.sleep).level == "ok"
    assert TAKEOVER_SECONDS / 2 < clock.seconds < TAKEOVER_SECONDS


def test_the_holder_of_another_lease_is_no_dispatcher(database: Database) -> None:
    assert Leadership(database, "retention", lease_seconds=600).seek()
    clock = Clock()
    assert check_dispatcher(database, "start one", clock=clock, sleep=clock.sleep).level == "bad"


# --- the workers ---------------------------------------------------------------------------------------------------


def test_a_worker_is_told_with_what_it_holds(database: Database, store: JobStore) -> None:
    introduce(store, "w@here", "sd15", "tiny")
    assert workers_said(database) == [Finding("worker", "ok", "w@here on cpu, 8 slots, serves sd15, tiny")]


def test_without_workers_one_is_to_be_started(database: Database) -> None:
    assert workers_said(database) == [NO_WORKER]


def test_a_silent_worker_is_a_warning_and_no_worker(database: Database, store: JobStore) -> None:
    introduce(store, "gone@here", database=database)
    warning, failure = workers_said(database)
    assert (warning.level, warning.what) == ("warn", "gone@here sends no heartbeats")
    assert failure == NO_WORKER


def test_a_worker_of_another_version_is_a_warning_and_a_worker(database: Database, store: JobStore) -> None:
    introduce(store, "old@here", version="0.0.1")
    (warning,) = workers_said(database)
    assert (warning.level, warning.what) == ("warn", f"old@here runs version 0.0.1, this is {__version__}")


def test_a_model_that_no_live_worker_serves_is_named_with_the_jobs_that_wait(
    database: Database, store: JobStore
) -> None:
    introduce(store, "w@here", "tiny")
    introduce(store, "gone@here", "sd15", database=database)
    for count, model in ((1, "flux"), (3, "sd15"), (2, "tiny")):
        submit(store, count, model)
    models = [finding for finding in workers_said(database) if finding.part == "models"]
    assert [(finding.level, finding.what) for finding in models] == [
        ("bad", "1 job waits for 'flux', which no live worker serves"),
        ("bad", "3 jobs wait for 'sd15', which no live worker serves"),
    ]
    assert [finding.do.split("=…")[0] for finding in models] == [
        "start a worker with FARM_MODELS=flux",
        "start a worker with FARM_MODELS=sd15",
    ]


@pytest.mark.parametrize("state", list(JobState))
def test_only_a_job_that_is_pending_or_queued_waits_for_a_worker(
    database: Database, store: JobStore, state: JobState
) -> None:
    submit(store, 1, "sd15")
    with database.write() as session:
        session.execute(sa.update(JobRow).values(state=state.value))
    waits = any(finding.part == "models" for finding in workers_said(database))
    assert waits == (state in (JobState.PENDING, JobState.QUEUED))


@pytest.mark.parametrize("what", ["job", "batch", "owner"])
def test_a_paused_job_waits_for_a_person_and_not_for_a_worker(database: Database, store: JobStore, what: str) -> None:
    batch_id = submit(store, 1, "sd15")
    named = {"job": {"job_id": f"{batch_id}-1"}, "batch": {"batch_id": batch_id}, "owner": {"owner": "me"}}[what]
    store.steering.pause(**named)
    assert workers_said(database) == [NO_WORKER]
    store.steering.resume(**named)
    assert [finding.part for finding in workers_said(database)] == ["worker", "models"]

"""The attempts of a job on every database: retries by error class, the recorded outcomes, and manual retries."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import sqlalchemy as sa

from farm.errors import ErrorClass
from farm.jobs.database import Database, now_plus
from farm.jobs.records import Claim, Pace, Picture, WorkerInfo
from farm.jobs.schema import JobRow
from farm.jobs.served_models import ServedModel
from farm.jobs.states import JobState, Outcome
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.spec import RenderSpec

PICTURE = Picture("b/1.png", "f" * 64, 123, 64, 64, "e" * 64, 1.5, (), device_seconds=0.75)
SMALL = WorkerInfo("small@host", "cuda", "float16", 8, "0", (ServedModel("tiny"),))
LARGE = replace(SMALL, name="large@host")
OTHER = replace(SMALL, name="other@host", models=(ServedModel("sd15"),))


@pytest.fixture
def store(database: Database) -> JobStore:
    return made(database)


def made(database: Database, **settings: float) -> JobStore:
    settings = {"max_tries": 3, "max_lost_leases": 3, "retry_seconds": 0, **settings}
    return JobStore.over(database, Settings(database_url="", broker_url="", s3_bucket="", **settings))


@pytest.fixture
def lapse(database: Database) -> Callable[[], None]:
    """Let every lease and every back-off expire by moving them back one minute."""

    def pass_time() -> None:
        with database.write() as session:
            for column in (JobRow.lease_until, JobRow.not_before):
                session.execute(
                    sa.update(JobRow).where(column.is_not(None)).values({column: now_plus(sa.literal(-60.0))})
                )

    return pass_time


def submitted(store: JobStore, count: int = 1) -> str:
    return store.submissions.submit("batch", "me", 50, (RenderSpec(prompt=f"prompt {n}") for n in range(count)))


def taken(store: JobStore, worker: str = "w1@host") -> Claim:
    """Dispatch the next job and claim it."""
    (bell,) = store.backlog.enqueue(1).queued
    claim = store.leases.claim(bell.job_id, worker)
    assert claim is not None
    return claim


def story(store: JobStore, job_id: str) -> list[tuple[int, str, str | None]]:
    return [(one.attempt, one.outcome.value, one.error_class) for one in store.queries.attempts(job_id)]


def test_each_attempt_that_ended_is_told_with_its_worker_and_its_reason(
    store: JobStore, lapse: Callable[[], None]
) -> None:
    job_id = f"{submitted(store)}-1"
    first = taken(store, "w1@host")
    store.leases.beat("w1@host", {(job_id, 1): Pace(7, 0.5)})
    assert store.queries.attempts(job_id) == []
    lapse()
    store.leases.expire()
    store.attempts.fail(taken(store, "w2@host"), "the loop broke")
    store.attempts.hand_back(taken(store, "w3@host"))
    store.attempts.succeed(taken(store, "w4@host"), PICTURE)
    told = store.queries.attempts(job_id)
    assert [(one.attempt, one.worker, one.outcome, one.reason) for one in told] == [
        (1, "w1@host", Outcome.LOST, "no sign of life from its worker"),
        (2, "w2@host", Outcome.RETRIED, "the loop broke"),
        (3, "w3@host", Outcome.HANDED_BACK, "its worker stops"),
        (4, "w4@host", Outcome.SUCCEEDED, None),
    ]
    assert [one.error_class for one in told] == [None, ErrorClass.TRANSIENT, None, None]
    assert [one.steps_done for one in told] == [7, 0, 0, 25]
    assert (told[-1].device_seconds, store.queries.job(job_id).picture) == (0.75, PICTURE)
    assert all(one.seconds is not None and one.seconds >= 0 for one in told)
    assert all(one.ended_at <= other.ended_at for one, other in pairwise(told))
    assert not store.attempts.succeed(first, PICTURE)
    assert store.queries.attempts(job_id) == told


def test_a_cancelled_attempt_is_told_as_that_however_its_worker_ended_it(store: JobStore) -> None:
    batch_id = submitted(store, 3)
    claims = [store.leases.claim(bell.job_id, "w1@host") for bell in store.backlog.enqueue(3).queued]
    store.steering.cancel(batch_id=batch_id)
    stopped, failed, handed_back = (claim for claim in claims if claim)
    store.attempts.stopped(stopped)
    store.attempts.fail(failed, "hiccup")
    store.attempts.hand_back(handed_back)
    for claim in (stopped, failed, handed_back):
        assert story(store, claim.job_id)[0][:2] == (1, "cancelled")
        assert store.queries.job(claim.job_id).state is JobState.CANCELLED


def test_an_error_waits_longer_each_time_before_the_job_is_tried_again(database: Database) -> None:
    store = made(database, retry_seconds=10, retry_max_seconds=60, max_tries=5)
    job_id = f"{submitted(store)}-1"
    waits = []
    for _ in range(4):
        assert store.attempts.fail(taken(store), "S3 is away")
        assert store.backlog.enqueue(1).queued == []
        (told,) = store.queries.attempts(job_id)[-1:]
        not_before = store.queries.job(job_id).not_before
        assert not_before is not None
        waits.append((not_before - told.ended_at).total_seconds())
        with database.write() as session:
            session.execute(sa.update(JobRow).values(not_before=now_plus(sa.literal(-0.1))))
    for wait, most in zip(waits, (10, 40, 60, 60), strict=True):
        assert most / 2 - 0.5 <= wait <= most + 0.5
    store.attempts.fail(taken(store), "S3 is still away")
    assert store.queries.job(job_id).state is JobState.FAILED
    assert [outcome for _, outcome, _ in story(store, job_id)] == ["retried"] * 4 + ["failed"]


def test_jobs_that_fail_together_are_retried_at_different_times(database: Database) -> None:
    store = made(database, retry_seconds=100)
    submitted(store, 8)
    for bell in store.backlog.enqueue(8).queued:
        claim = store.leases.claim(bell.job_id, "w1@host")
        assert claim is not None
        store.attempts.fail(claim, "S3 is away")
    with database.read() as session:
        times = set(session.scalars(sa.select(JobRow.not_before)))
    assert (max(times) - min(times)).total_seconds() > 1


@pytest.mark.parametrize("error_class", [ErrorClass.BAD_INPUT, ErrorClass.POISON])
def test_an_error_that_another_try_can_not_help_fails_at_once(store: JobStore, error_class: ErrorClass) -> None:
    submitted(store)
    claim = taken(store)
    store.attempts.fail(claim, "no such sampler", error_class)
    job = store.queries.job(claim.job_id)
    assert (job.state, job.error) == (JobState.FAILED, "no such sampler")
    assert story(store, claim.job_id) == [(1, "failed", error_class)]


def test_a_job_without_memory_here_is_left_to_another_worker(store: JobStore) -> None:
    for worker in (SMALL, LARGE, OTHER):
        store.workers.register(worker)
    job_id = f"{submitted(store)}-1"
    assert store.attempts.fail(taken(store, "small@host"), "no memory", ErrorClass.OUT_OF_MEMORY)
    assert store.queries.job(job_id).avoid_worker == "small@host"
    assert [bell.job_id for bell in store.backlog.enqueue(1).queued] == [job_id]
    assert store.leases.claim(job_id, "small@host") is None
    assert store.queries.job(job_id).state is JobState.PENDING
    assert taken(store, "large@host").attempt == 2


@pytest.mark.parametrize("how", ["gone", "dead", "another model"])
def test_a_job_without_memory_here_is_tried_here_again_if_no_other_worker_serves_its_model(
    store: JobStore, database: Database, how: str
) -> None:
    store.workers.register(SMALL)
    store.workers.register(OTHER)
    if how == "dead":
        store.workers.register(LARGE)
        with database.write() as session:
            session.execute(
                sa.text("UPDATE workers SET seen_at = '2000-01-01 00:00:00.000000' WHERE name = 'large@host'")
            )
    if how == "gone":
        store.workers.register(LARGE)
        store.workers.deregister("large@host")
    job_id = f"{submitted(store)}-1"
    for attempt in (1, 2, 3):
        claim = taken(store, "small@host")
        assert claim.attempt == attempt
        store.attempts.fail(claim, "no memory", ErrorClass.OUT_OF_MEMORY)
    assert store.queries.job(job_id).state is JobState.FAILED
    assert story(store, job_id)[-1] == (3, "failed", ErrorClass.OUT_OF_MEMORY)


def test_a_job_that_keeps_losing_its_worker_fails_as_poison(store: JobStore, lapse: Callable[[], None]) -> None:
    job_id = f"{submitted(store)}-1"
    for _ in range(3):
        taken(store)
        lapse()
        assert store.leases.expire() == 1
    job = store.queries.job(job_id)
    assert job.state is JobState.FAILED
    assert "set aside" in (job.error or "")
    assert story(store, job_id) == [(1, "lost", None), (2, "lost", None), (3, "lost", ErrorClass.POISON)]


def test_neighbours_that_keep_losing_their_worker_come_back_one_after_another(
    database: Database, lapse: Callable[[], None]
) -> None:
    store = made(database, retry_seconds=30, max_lost_leases=5)
    submitted(store, 8)
    for _ in range(2):
        bells = store.backlog.enqueue(8).queued
        assert len(bells) == 8
        for bell in bells:
            store.leases.claim(bell.job_id, "w1@host")
        lapse()
        assert store.leases.expire() == 8
    assert store.backlog.enqueue(8).queued == []
    with database.read() as session:
        assert len(set(session.scalars(sa.select(JobRow.not_before)))) == 8


def test_failed_jobs_are_tried_anew_when_a_person_wants_it(store: JobStore, lapse: Callable[[], None]) -> None:
    batch_id = submitted(store, 3)
    for _ in range(2):
        store.attempts.fail(taken(store), "no such sampler", ErrorClass.BAD_INPUT)
    store.attempts.succeed(taken(store), PICTURE)
    assert store.queries.batch(batch_id).done
    assert store.steering.retry(batch_id=batch_id) == 2
    assert store.steering.retry(batch_id=batch_id) == 0
    status = store.queries.batch(batch_id)
    assert (status.counts[JobState.PENDING], status.counts[JobState.SUCCEEDED]) == (2, 1)
    assert status.finished_at is None
    again = taken(store, "w2@host")
    assert (again.attempt, again.tries, store.queries.job(again.job_id).error) == (2, 0, None)
    store.attempts.succeed(again, PICTURE)
    assert story(store, again.job_id) == [(1, "failed", ErrorClass.BAD_INPUT), (2, "succeeded", None)]


def test_a_job_that_was_set_aside_has_all_its_tries_and_leases_again(
    store: JobStore, lapse: Callable[[], None]
) -> None:
    job_id = f"{submitted(store)}-1"
    store.attempts.fail(taken(store), "hiccup")
    for _ in range(3):
        taken(store)
        lapse()
        store.leases.expire()
    assert store.steering.retry(job_id=job_id) == 1
    for _ in range(2):
        taken(store)
        lapse()
        store.leases.expire()
        assert store.queries.job(job_id).state is JobState.PENDING
    claim = taken(store)
    assert (claim.attempt, claim.tries) == (7, 0)
    assert len(store.queries.attempts(job_id)) == 6


@pytest.mark.parametrize("state", ["pending", "queued", "running", "succeeded", "cancelled"])
def test_only_a_failed_job_is_tried_anew(store: JobStore, state: str) -> None:
    batch_id = submitted(store)
    if state in ("queued", "running", "succeeded"):
        (bell,) = store.backlog.enqueue(1).queued
        claim = store.leases.claim(bell.job_id, "w1@host") if state != "queued" else None
        if claim and state == "succeeded":
            store.attempts.succeed(claim, PICTURE)
    if state == "cancelled":
        store.steering.cancel(batch_id=batch_id)
    assert store.steering.retry(batch_id=batch_id) == 0
    assert store.queries.job(f"{batch_id}-1").state == state


def test_the_attempts_of_a_deleted_job_go_with_it(store: JobStore, database: Database) -> None:
    job_id = f"{submitted(store)}-1"
    store.attempts.hand_back(taken(store))
    assert store.queries.attempts(job_id)
    with database.write() as session:
        session.execute(sa.delete(JobRow))
    assert store.queries.attempts(job_id) == []

"""Claims and finishes of many jobs in one transaction, on every database: each has the same effect as if made alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import sqlalchemy as sa

from farm.jobs.database import Database
from farm.jobs.records import Picture, Success
from farm.jobs.schema import JobRow
from farm.jobs.states import JobState, Outcome
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.spec import RenderSpec
from workers.service.leases import HeldLeases

PICTURE = Picture("b/1.png", "f" * 64, 123, 64, 64, "e" * 64, 1.5, ("cut off",), device_seconds=0.75)


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore.over(database, Settings(database_url="", broker_url="", s3_bucket=""))


def queued(store: JobStore, count: int) -> list[str]:
    specs = [RenderSpec(prompt=f"prompt {n}", num_inference_steps=n + 1) for n in range(count)]
    store.submissions.submit("batch", "me", 50, specs)
    return [bell.job_id for bell in store.backlog.enqueue(count).queued]


def test_a_group_claims_what_is_queued_and_nothing_else(store: JobStore) -> None:
    first, second, third = queued(store, 3)
    store.leases.claim(second, "w2@host")
    claims = store.leases.claim_many([first, second, third, "nobody-1"], "w1@host")
    assert {(claim.job_id, claim.attempt, claim.index) for claim in claims.values()} == {(first, 1, 1), (third, 1, 3)}
    assert [store.queries.job(job_id).worker for job_id in (first, second, third)] == ["w1@host", "w2@host", "w1@host"]


def test_a_group_puts_back_what_was_paused_on_its_way(store: JobStore, database: Database) -> None:
    first, second = queued(store, 2)
    with database.write() as session:
        session.execute(sa.update(JobRow).where(JobRow.id == second).values(paused=True))
    assert set(store.leases.claim_many([first, second], "w1@host")) == {first}
    assert store.queries.job(second).state is JobState.PENDING


def test_a_group_ends_each_job_with_its_own_picture(store: JobStore) -> None:
    claims = store.leases.claim_many(queued(store, 3), "w1@host")
    ended = [Success(claim, replace(PICTURE, key=f"b/{job_id}.png")) for job_id, claim in claims.items()]
    assert store.attempts.succeed_many(ended) == set(claims)
    for job_id, claim in claims.items():
        job, (attempt,) = store.queries.job(job_id), store.queries.attempts(job_id)
        assert (job.state, job.steps_done) == (JobState.SUCCEEDED, claim.spec.num_inference_steps)
        assert job.picture == replace(PICTURE, key=f"b/{job_id}.png")
        assert (attempt.outcome, attempt.worker, attempt.attempt) == (Outcome.SUCCEEDED, "w1@host", 1)
        assert (attempt.steps_done, attempt.device_seconds) == (claim.spec.num_inference_steps, 0.75)


def test_a_zombie_in_a_group_changes_nothing_and_does_not_delay_the_others(store: JobStore) -> None:
    claims = store.leases.claim_many(queued(store, 3), "w1@host")
    zombie, *others = claims.values()
    store.attempts.hand_back(zombie)
    store.leases.claim(store.backlog.enqueue(1).queued[0].job_id, "w2@host")
    recorded = store.attempts.succeed_many([Success(claim, PICTURE) for claim in claims.values()])
    assert recorded == {claim.job_id for claim in others}
    job = store.queries.job(zombie.job_id)
    assert (job.state, job.worker, job.attempt, job.picture) == (JobState.RUNNING, "w2@host", 2, None)
    # Repeating the call after a lost answer reports the same jobs and records nothing twice.
    assert store.attempts.succeed_many([Success(claim, PICTURE) for claim in claims.values()]) == recorded
    assert [len(store.queries.attempts(claim.job_id)) for claim in others] == [1, 1]


def test_a_group_waits_for_a_job_that_another_transaction_changes(store: JobStore, database: Database) -> None:
    first, second = store.leases.claim_many(queued(store, 2), "w1@host").values()
    with ThreadPoolExecutor(1) as thread:
        with database.write() as session:
            session.execute(sa.update(JobRow).where(JobRow.id == second.job_id).values(cancel_requested=True))
            ending = thread.submit(store.attempts.succeed_many, [Success(first, PICTURE), Success(second, PICTURE)])
            if database.engine.dialect.name == "postgresql":  # SQLite has only one writer at a time
                while store.queries.job(first.job_id).state is not JobState.SUCCEEDED:  # although second is locked
                    threading.Event().wait(0.01)
            assert not ending.done()
        assert ending.result(10) == {first.job_id, second.job_id}


def test_of_two_messages_for_one_job_one_claims_it(database: Database, store: JobStore) -> None:
    ignored = {"progress": dict, "cancel": id, "hand_back": max, "previews": id}
    leases = HeldLeases(store.leases, "w1@host", Settings(database_url="", broker_url="", s3_bucket=""), **ignored)
    (job_id,) = queued(store, 1)
    claims = leases._claim_all([job_id, job_id])
    assert [claim is not None for claim in claims] == [True, False]

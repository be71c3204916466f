"""Batches after their last job has ended, on every database: the end is noted, the batch deleted, its rows removed."""

import hashlib
import json
import re

import pytest
import sqlalchemy as sa

from farm.errors import ErrorClass, NotEnded, NotFound
from farm.jobs.database import Database, now_plus
from farm.jobs.records import Claim, Picture
from farm.jobs.schema import AttemptRow, BatchRow, JobCountRow, JobRow
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.spec import RenderSpec

DATA = b"a picture"


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore.over(database, Settings(database_url="", broker_url="", s3_bucket="", retry_seconds=0, window=4096))


def submitted(store: JobStore, count: int = 3, **options: str) -> str:
    return store.submissions.submit(
        "sea", "me", 50, (RenderSpec(prompt=f"prompt {n}", seed=n) for n in range(count)), **options
    )


def claimed(store: JobStore, batch_id: str, count: int = 3) -> list[Claim]:
    store.backlog.enqueue(99)
    claims = [store.leases.claim(f"{batch_id}-{n}", "w1@host") for n in range(1, count + 1)]
    return [claim for claim in claims if claim is not None]


def picture(claim: Claim) -> Picture:
    key = f"{claim.batch_id}/{claim.index:05d}.png"
    return Picture(key, hashlib.sha256(DATA).hexdigest(), len(DATA), 64, 64, "e" * 64, 0.5)


def ended(store: JobStore) -> str:
    """Return a batch of three ended jobs: two succeeded, one failed."""
    batch_id = submitted(store)
    good, fine, bad = claimed(store, batch_id)
    assert store.attempts.succeed(good, picture(good))
    assert store.attempts.succeed(fine, picture(fine))
    assert store.attempts.fail(bad, "no such sampler", ErrorClass.BAD_INPUT)
    return batch_id


def noted(store: JobStore) -> str:
    batch_id = ended(store)
    at = store.endings.last_ended_at(batch_id)
    assert at is not None
    assert store.endings.note(batch_id, at)
    return batch_id


def test_a_batch_is_found_once_when_its_last_job_has_ended(store: JobStore) -> None:
    submitted(store, 1)
    assert (store.endings.unnoted(), store.endings.last_ended_at("nothing")) == ([], None)
    batch_id = ended(store)
    assert store.endings.unnoted() == [batch_id]
    at = store.endings.last_ended_at(batch_id)
    assert at == store.queries.batch(batch_id).finished_at
    assert store.endings.note(batch_id, at)
    assert (store.endings.unnoted(), store.endings.noted(batch_id)) == ([], True)


@pytest.mark.parametrize("kind", ["batch", "job", "owner"])
def test_a_batch_that_is_tried_anew_ends_anew(store: JobStore, kind: str) -> None:
    batch_id = noted(store)
    which = {"batch": {"batch_id": batch_id}, "job": {"job_id": f"{batch_id}-3"}, "owner": {"owner": "me"}}[kind]
    assert store.steering.retry(**which) == 1
    assert (store.endings.unnoted(), store.endings.noted(batch_id)) == ([], False)
    store.steering.cancel(batch_id=batch_id)
    assert store.endings.unnoted() == [batch_id]


def test_an_end_is_not_noted_of_a_batch_that_was_tried_anew_meanwhile(store: JobStore) -> None:
    batch_id = ended(store)
    at = store.endings.last_ended_at(batch_id)
    assert at is not None
    store.steering.retry(batch_id=batch_id)
    assert not store.endings.note(batch_id, at)
    (claim,) = [store.leases.claim(bell.job_id, "w1@host") for bell in store.backlog.enqueue(9).queued]
    assert claim is not None
    store.attempts.succeed(claim, picture(claim))
    assert not store.endings.note(batch_id, at)  # the batch has ended again, at a later time
    assert store.endings.unnoted() == [batch_id]


def test_entries_say_what_became_of_each_job_in_order_and_what_there_is_to_be_said(store: JobStore) -> None:
    batch_id = ended(store)
    first, _, bad = store.endings.entries(batch_id)
    sha256 = hashlib.sha256(DATA).hexdigest()
    assert first == {
        "id": f"{batch_id}-1",
        "index": 1,
        "state": "succeeded",
        "spec": json.loads(RenderSpec(prompt="prompt 0", seed=0).to_json()),
        "key": f"{batch_id}/00001.png",
        "sha256": sha256,
        "bytes": len(DATA),
        "width": 64,
        "height": 64,
        "worker": "w1@host",
        "model_sha256": "e" * 64,
        "seconds": 0.5,
    }
    del bad["spec"]
    assert bad == {
        "id": f"{batch_id}-3",
        "index": 3,
        "state": "failed",
        "worker": "w1@host",
        "error": "no such sampler",
    }


def test_entries_go_on_from_page_to_page(store: JobStore) -> None:
    batch_id = submitted(store, 2345)
    assert [entry["index"] for entry in store.endings.entries(batch_id)] == list(range(1, 2346))


def test_only_failed_jobs_are_listed_with_their_errors(store: JobStore) -> None:
    batch_id = ended(store)
    assert [(job.index, job.error) for job in store.queries.wrong(batch_id)] == [(3, "no such sampler")]
    assert store.queries.wrong(submitted(store)) == []


def test_a_batch_of_a_paused_owner_is_paused(store: JobStore) -> None:
    batch_id = submitted(store)
    assert not store.queries.batch(batch_id).paused
    store.steering.pause(owner="me")
    assert store.queries.batch(batch_id).paused
    store.steering.pause(batch_id=batch_id)
    store.steering.resume(owner="me")
    assert [batch.paused for batch in store.queries.batches()] == [True]


def test_a_deleted_batch_is_not_found_and_its_key_is_free(store: JobStore) -> None:
    batch_id = submitted(store, key="monday")
    store.deletions.mark(batch_id, cancel=True)
    for ask in (
        lambda: store.queries.batch(batch_id),
        lambda: store.queries.batch("sea"),
        lambda: store.queries.job(f"{batch_id}-1"),
    ):
        with pytest.raises(NotFound):
            ask()
    assert store.queries.batches() == []
    assert (
        store.overview.waiting_by_model(),
        store.overview.unheld(),
        store.backlog.enqueue(9).queued,
        store.endings.unnoted(),
    ) == ({}, [], [], [])
    assert submitted(store, key="monday") != batch_id
    assert store.deletions.marked() == [batch_id]
    assert store.submissions.abandoned() == []
    with pytest.raises(NotFound):
        store.deletions.mark(batch_id)


def test_a_batch_that_has_not_ended_is_deleted_only_with_cancel(store: JobStore) -> None:
    batch_id = submitted(store)
    with pytest.raises(NotEnded, match=re.escape(f"3 jobs of {batch_id}")):
        store.deletions.mark(batch_id)
    held, *_ = claimed(store, batch_id, 1)
    store.deletions.mark(batch_id, cancel=True)
    assert store.leases.claim(f"{batch_id}-2", "w1@host") is None  # the message of a cancelled job has no effect
    assert not store.deletions.at_rest(batch_id)
    assert store.leases.beat("w1@host", {}).cancelled == frozenset()
    assert store.attempts.stopped(held)
    assert store.deletions.at_rest(batch_id)


def test_what_a_late_pass_has_queued_is_stopped(store: JobStore, database: Database) -> None:
    batch_id = submitted(store)
    store.deletions.mark(batch_id, cancel=True)
    with database.write() as session:  # as by a dispatcher whose pass began before the batch was marked
        session.execute(sa.update(JobRow).values(state=JobState.QUEUED.value))
    assert store.deletions.at_rest(batch_id)
    assert store.leases.claim(f"{batch_id}-1", "w1@host") is None


def rows_of(database: Database) -> tuple[int, ...]:
    with database.read() as session:
        tables = (BatchRow, JobRow, AttemptRow, JobCountRow)
        return tuple(session.scalar(sa.select(sa.func.count()).select_from(table)) or 0 for table in tables)


def test_only_rows_of_the_batch_are_deleted_in_pieces_by_any_process(store: JobStore, database: Database) -> None:
    other = ended(store)
    batch_id = submitted(store, 2500)
    held, *_ = claimed(store, batch_id, 1)
    store.attempts.succeed(held, picture(held))
    store.deletions.mark(batch_id, cancel=True)
    after = store.deletions.delete_rows(batch_id)
    assert after == 1000
    assert store.deletions.delete_rows(batch_id) == 2000  # a second process continues after the first thousand
    assert store.deletions.delete_rows(batch_id, after) == 2000
    assert store.deletions.marked() == [batch_id]
    assert store.deletions.delete_rows(batch_id, 2000) is None
    assert store.deletions.delete_rows(batch_id) is None
    assert rows_of(database)[:3] == (1, 3, 3)
    assert store.queries.batch(other).counts[JobState.SUCCEEDED] == 2
    assert store.deletions.marked() == []


def test_a_batch_that_is_there_is_not_forgotten(store: JobStore, database: Database) -> None:
    batch_id = ended(store)
    assert store.deletions.delete_rows(batch_id) is None
    assert rows_of(database)[:3] == (1, 3, 3)


def test_batches_are_given_up_by_how_long_ago_they_ended(store: JobStore, database: Database) -> None:
    old, young, tried = noted(store), noted(store), noted(store)
    with database.write() as session:
        long_ago = sa.update(BatchRow).values(ended_at=now_plus(sa.literal(-3 * 24 * 3600.0)))
        session.execute(long_ago.where(BatchRow.id.in_([old, tried])))
    store.steering.retry(batch_id=tried)
    assert store.deletions.mark_older_than(4) == []
    assert store.deletions.mark_older_than(2.9) == [old]
    assert store.deletions.marked() == [old]
    assert {batch.id for batch in store.queries.batches()} == {young, tried}


def test_a_copy_for_a_batch_that_was_given_up_meanwhile_comes_too_late(store: JobStore) -> None:
    source = ended(store)
    batch_id = submitted(store, 1)
    made = store.reuse.begin_copies({f"{batch_id}-1": f"{source}-1"})
    assert len(made) == 1
    store.deletions.mark(batch_id, cancel=True)
    assert store.deletions.at_rest(batch_id)
    assert store.reuse.record_copies(made) == made  # too late: the process that made the copy deletes it

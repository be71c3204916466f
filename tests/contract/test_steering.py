"""Cancel, pause and resume of jobs, batches and owners, on every database."""

from collections.abc import Iterator

import pytest

from farm.errors import ErrorClass
from farm.jobs import steering
from farm.jobs.database import Database
from farm.jobs.leadership import Leadership
from farm.jobs.records import Claim, Pace
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.spec import RenderSpec


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore.over(database, Settings(database_url="", broker_url="", s3_bucket="", retry_seconds=0))


def submitted(store: JobStore, count: int = 1, owner: str = "me") -> str:
    return store.submissions.submit("batch", owner, 50, (RenderSpec(prompt=f"prompt {n}") for n in range(count)))


def claim(store: JobStore, job_id: str) -> Claim:
    held = store.leases.claim(job_id, "w1@host")
    assert held is not None
    return held


def which(kind: str, batch_id: str) -> dict[str, str]:
    return {"batch": {"batch_id": batch_id}, "job": {"job_id": f"{batch_id}-1"}, "owner": {"owner": "me"}}[kind]


KINDS = pytest.mark.parametrize("kind", ["batch", "job", "owner"])


@KINDS
def test_what_is_paused_waits_in_the_backlog_until_it_goes_on(store: JobStore, kind: str) -> None:
    batch_id = submitted(store, 1)
    other = submitted(store, 1, owner="somebody else")
    assert store.steering.pause(**which(kind, batch_id)) == 1
    assert [bell.job_id for bell in store.backlog.enqueue(9).queued] == [f"{other}-1"]
    assert store.steering.resume(**which(kind, batch_id)) == 1
    assert [bell.job_id for bell in store.backlog.enqueue(9).queued] == [f"{batch_id}-1"]


@KINDS
def test_a_queued_job_returns_to_the_backlog_and_its_message_has_no_effect(store: JobStore, kind: str) -> None:
    batch_id = submitted(store, 1)
    (bell,) = store.backlog.enqueue(9).queued
    assert store.steering.pause(**which(kind, batch_id)) == 1
    assert store.queries.job(bell.job_id).state is JobState.PENDING
    assert store.leases.claim(bell.job_id, "w1@host") is None
    assert store.backlog.enqueue(9).queued == []


@KINDS
def test_a_worker_learns_with_its_beat_what_to_hand_back_and_it_goes_on_later(store: JobStore, kind: str) -> None:
    batch_id = submitted(store, 1)
    (bell,) = store.backlog.enqueue(9).queued
    held = claim(store, bell.job_id)
    assert store.leases.beat("w1@host", {(held.job_id, 1): Pace(3, 0.1)}).paused == frozenset()
    store.steering.pause(**which(kind, batch_id))
    beat = store.leases.beat("w1@host", {(held.job_id, 1): Pace(4, 0.1)})
    assert (beat.paused, beat.cancelled, beat.lost) == ({held.job_id}, frozenset(), frozenset())
    store.attempts.record_checkpoint(held, "state")
    assert store.attempts.hand_back(held, "paused")
    assert store.backlog.enqueue(9).queued == []
    store.steering.resume(**which(kind, batch_id))
    (bell,) = store.backlog.enqueue(9).queued
    again = claim(store, bell.job_id)
    assert (again.attempt, again.tries, again.checkpoint_key) == (2, 0, "state")
    assert [(one.outcome, one.reason) for one in store.queries.attempts(held.job_id)] == [("handed_back", "paused")]


@KINDS
def test_a_job_that_is_paused_between_its_dispatch_and_its_claim_is_put_back(
    store: JobStore, database: Database, kind: str
) -> None:
    batch_id = submitted(store, 1)
    (bell,) = store.backlog.enqueue(9).queued
    store.steering.pause(**which(kind, batch_id))
    # The state after a dispatcher's pass that began before the pause and ended after it.
    with database.write() as session:
        session.connection().exec_driver_sql("UPDATE jobs SET state = 'queued'")
    assert store.leases.claim(bell.job_id, "w1@host") is None
    assert store.queries.job(bell.job_id).state is JobState.PENDING
    store.steering.resume(**which(kind, batch_id))
    assert len(store.backlog.enqueue(9).queued) == 1


def test_each_pause_ends_by_itself(store: JobStore) -> None:
    batch_id = submitted(store, 2)
    store.steering.pause(owner="me")
    store.steering.pause(batch_id=batch_id)
    store.steering.pause(job_id=f"{batch_id}-1")
    assert store.queries.job(f"{batch_id}-1").paused
    store.steering.resume(owner="me")
    assert store.backlog.enqueue(9).queued == []
    store.steering.resume(batch_id=batch_id)
    assert [bell.job_id for bell in store.backlog.enqueue(9).queued] == [f"{batch_id}-2"]
    store.steering.resume(job_id=f"{batch_id}-1")
    assert [bell.job_id for bell in store.backlog.enqueue(9).queued] == [f"{batch_id}-1"]


def test_what_a_paused_owner_hands_in_later_waits_too(store: JobStore) -> None:
    assert store.steering.pause(owner="me") == 0
    submitted(store)
    assert store.backlog.enqueue(9).queued == []
    store.steering.resume(owner="me")
    assert len(store.backlog.enqueue(9).queued) == 1


@KINDS
def test_what_is_paused_can_be_cancelled(store: JobStore, kind: str) -> None:
    batch_id = submitted(store, 1)
    store.steering.pause(**which(kind, batch_id))
    assert store.steering.cancel(**which(kind, batch_id)) == 1
    assert store.queries.job(f"{batch_id}-1").state is JobState.CANCELLED
    assert store.steering.resume(**which(kind, batch_id)) == 0
    assert store.backlog.enqueue(9).queued == []


def test_an_owner_is_cancelled_whole_and_nobody_else(store: JobStore) -> None:
    mine, too, other = submitted(store, 2), submitted(store, 1), submitted(store, 1, owner="other")
    assert store.steering.cancel(owner="me") == 3
    assert [store.queries.batch(batch_id).done for batch_id in (mine, too, other)] == [True, True, False]


@pytest.mark.parametrize("kind", ["batch", "owner"])
def test_of_many_jobs_some_are_changed_at_a_time_and_workers_renew_between(
    store: JobStore, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = submitted(store, 3)
    store.steering.cancel(batch_id=ended)
    batch_id = submitted(store, 5)
    first, second, third = [bell.job_id for bell in store.backlog.enqueue(3).queued]
    held, failed = claim(store, second), claim(store, third)
    assert store.attempts.fail(failed, "no", ErrorClass.BAD_INPUT)
    monkeypatch.setattr(steering, "_PIECE", 2)
    between = []

    def rest(seconds: float) -> None:
        if not seconds:
            return
        beat = store.leases.beat("w1@host", {(held.job_id, held.attempt): Pace(1, 0.1)})
        between.append((beat.lost, beat.cancelled, store.queries.batch(batch_id).counts[JobState.CANCELLED]))

    monkeypatch.setattr(steering.time, "sleep", rest)
    assert store.steering.cancel(**which(kind, batch_id)) == 4
    assert between == [(frozenset(), {second}, 1), (frozenset(), {second}, 2)]
    assert [store.queries.job(f"{batch_id}-{n}").state for n in range(1, 6)] == [
        JobState.CANCELLED,
        JobState.RUNNING,
        JobState.FAILED,
        JobState.CANCELLED,
        JobState.CANCELLED,
    ]
    between.clear()
    assert store.steering.retry(**which(kind, batch_id)) == 1
    assert not between  # a change of few jobs has no pauses, however many other jobs there are
    assert store.queries.job(third).state is JobState.PENDING
    assert first != third


def test_an_owners_batches_that_are_handed_in_meanwhile_or_deleted_are_not_cancelled(
    store: JobStore, database: Database
) -> None:
    deleted = submitted(store, 2)
    store.deletions.mark(deleted, cancel=True)

    def specs() -> Iterator[RenderSpec]:
        for n in range(4500):
            if n == 4400:  # several thousand are staged by now
                assert store.steering.cancel(owner="me") == 0
            yield RenderSpec(prompt=f"prompt {n}")

    batch_id = store.submissions.submit("batch", "me", 50, specs())
    assert store.queries.batch(batch_id).counts == {state: 4500 * (state is JobState.PENDING) for state in JobState}


def test_exactly_one_target_is_accepted(store: JobStore) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        store.steering.cancel()
    with pytest.raises(ValueError, match="exactly one"):
        store.steering.pause(batch_id="b", owner="me")


def test_one_leads_until_its_lease_runs_out_or_it_resigns(database: Database) -> None:
    first, second = (Leadership(database, "dispatcher", lease_seconds=60) for _ in range(2))
    elsewhere = Leadership(database, "another office", lease_seconds=60)
    assert first.seek()
    assert not second.seek()
    assert elsewhere.seek()
    assert first.seek()
    with database.write() as session:
        session.connection().exec_driver_sql("UPDATE leaders SET until = '2000-01-01 00:00:00.000000'")
    assert second.seek()
    assert not first.seek()
    second.resign()
    assert first.seek()
    second.resign()  # a process that does not hold the lease can't release it
    assert not second.seek()

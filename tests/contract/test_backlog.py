"""The order of dispatch on every database: priorities, fair shares, caps and pauses; and the cost of a pass."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa

from farm.errors import ErrorClass
from farm.jobs import backlog, charges, waiting
from farm.jobs.database import Database, now_plus
from farm.jobs.records import Picture, Success
from farm.jobs.schema import BatchRow, JobRow, OwnerRow
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.spec import RenderSpec
from tests.query_plan import plan

PICTURE = Picture("b/1.png", "f" * 64, 123, 64, 64, "e" * 64, 1.0)


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore.over(database, Settings(database_url="", broker_url="", s3_bucket=""))


@pytest.fixture(autouse=True)
def _correct_charges_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "_CORRECT_SECONDS", 0.0)


def some(count: int, **fields: object) -> Iterator[RenderSpec]:
    return (RenderSpec(prompt=f"prompt {n}", **fields) for n in range(1, count + 1))


def change(database: Database, table: type, which: sa.ColumnElement[bool], **values: object) -> None:
    with database.write() as session:
        session.execute(sa.update(table).where(which).values(**values))


def of_batch(job_id: str) -> str:
    return job_id.rpartition("-")[0]


def served(store: JobStore, count: int, seconds: dict[str, float] | None = None) -> list[str]:
    """Render `count` jobs one after another, each in its batch's seconds, and return their batches in that order."""
    found = []
    for _ in range(count):
        (bell,) = store.backlog.enqueue(1).queued
        claim = store.leases.claim(bell.job_id, "w1@host")
        assert claim is not None
        took = (seconds or {}).get(claim.batch_id, 1.0)
        store.attempts.succeed(claim, replace(PICTURE, render_seconds=took))
        found.append(claim.batch_id)
    return found


def test_batches_of_one_priority_take_turns(store: JobStore) -> None:
    first, second = (
        store.submissions.submit("a", "me", 50, some(500)),
        store.submissions.submit("b", "me", 50, some(500)),
    )
    bells = [of_batch(bell.job_id) for bell in store.backlog.enqueue(10).queued]
    assert bells == [first, second] * 5


def test_jobs_of_a_batch_come_in_their_order(store: JobStore) -> None:
    batch_id = store.submissions.submit("a", "me", 50, some(30))
    ids = []
    for _ in range(3):
        for bell in store.backlog.enqueue(10).queued:
            ids.append(bell.job_id)
            store.leases.claim(bell.job_id, "w1@host")
    assert ids == [f"{batch_id}-{n}" for n in range(1, 31)]


def test_a_small_batch_behind_a_large_one_has_every_second_turn(store: JobStore) -> None:
    store.submissions.submit("large", "me", 50, some(500))
    for bell in store.backlog.enqueue(20).queued:
        store.leases.claim(bell.job_id, "w1@host")
    small = store.submissions.submit("small", "you", 50, some(3))
    assert [of_batch(bell.job_id) for bell in store.backlog.enqueue(6).queued].count(small) == 3


def test_owners_share_by_device_seconds_and_weight(store: JobStore, database: Database) -> None:
    mine = [store.submissions.submit(name, "me", 50, some(100)) for name in "abc"]
    yours = store.submissions.submit("z", "you", 50, some(100))
    served(store, 8, {yours: 3.0})
    # The durations are measured by now: a job of yours takes as long as three of mine.
    counts = Counter(served(store, 24, {yours: 3.0}))
    assert 5 <= counts[yours] <= 7
    assert max(counts[one] for one in mine) - min(counts[one] for one in mine) <= 1
    change(database, OwnerRow, OwnerRow.name == "you", weight=3.0)
    assert 10 <= Counter(served(store, 24, {yours: 3.0}))[yours] <= 14


def charged(database: Database, batch_id: str, owner: str = "me") -> tuple[float, float]:
    """Return the virtual times of a batch and its owner, both of weight 1."""
    with database.read() as session:
        return session.get_one(BatchRow, batch_id).virtual_time, session.get_one(OwnerRow, owner).virtual_time


def another_process(database: Database) -> JobStore:
    return JobStore.over(database, Settings(database_url="", broker_url="", s3_bucket=""))


def test_a_charge_is_corrected_when_it_is_known_what_the_job_took(store: JobStore, database: Database) -> None:
    batch_id = store.submissions.submit("a", "me", 50, some(10))
    served(store, 2, {batch_id: 7.0})
    store.submissions.submit("other", "me", 50, some(1, model="other"))
    bells = store.backlog.enqueue(1).queued  # 7 + 7 measured, 7 estimated for the third; 1 for the other model's job
    assert charged(database, batch_id) == pytest.approx((21.0, 22.0))
    store.backlog.unqueue([bell.job_id for bell in bells])
    store.backlog.enqueue(1)  # refunds both charges and makes them again
    assert charged(database, batch_id) == pytest.approx((21.0, 22.0))


def test_a_charge_is_corrected_by_another_process(store: JobStore, database: Database) -> None:
    batch_id = store.submissions.submit("a", "me", 50, some(1))
    served(store, 1, {batch_id: 7.0})
    assert charged(database, batch_id) == pytest.approx((1.0, 1.0))
    another_process(database).backlog.enqueue(1)
    assert charged(database, batch_id) == pytest.approx((7.0, 7.0))
    another_process(database).backlog.enqueue(1)
    assert charged(database, batch_id) == pytest.approx((7.0, 7.0)), "it is corrected once"


def test_a_restart_of_the_dispatcher_loses_no_charge(store: JobStore, database: Database) -> None:
    batch_id = store.submissions.submit("a", "me", 50, some(4))
    claims = [store.leases.claim(bell.job_id, "w1@host") for bell in store.backlog.enqueue(3).queued]
    assert charged(database, batch_id) == pytest.approx((3.0, 3.0))
    successor = another_process(database)
    successor.backlog.enqueue(0)
    assert charged(database, batch_id) == pytest.approx((3.0, 3.0)), "nothing is known yet"
    for claim, seconds in zip(claims, (5.0, 6.0, 7.0), strict=True):
        assert claim is not None
        store.attempts.succeed(claim, replace(PICTURE, render_seconds=90.0, device_seconds=seconds))
    successor.backlog.enqueue(1)  # charges 6 for the fourth job
    assert charged(database, batch_id) == pytest.approx((18.0 + 6.0, 18.0 + 6.0))


def test_a_job_that_comes_back_twice_is_charged_for_what_it_took_in_the_end(
    store: JobStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = store.submissions.submit("a", "me", 50, some(1))
    monkeypatch.setattr(backlog, "_CORRECT_SECONDS", 60.0)
    for _ in range(3):
        (bell,) = store.backlog.enqueue(1).queued
        store.backlog.unqueue([bell.job_id])
    assert charged(database, batch_id) == pytest.approx((3.0, 3.0))
    (bell,) = another_process(database).backlog.enqueue(1).queued
    assert charged(database, batch_id) == pytest.approx((1.0, 1.0))
    claim = store.leases.claim(bell.job_id, "w1@host")
    assert claim is not None
    store.attempts.succeed(claim, replace(PICTURE, render_seconds=4.0))
    another_process(database).backlog.enqueue(1)
    assert charged(database, batch_id) == pytest.approx((4.0, 4.0))


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
def test_the_charge_of_a_job_without_a_picture_stands(store: JobStore, database: Database, how: str) -> None:
    batch_id = store.submissions.submit("a", "me", 50, some(1))
    (bell,) = store.backlog.enqueue(1).queued
    claim = store.leases.claim(bell.job_id, "w1@host")
    assert claim is not None
    if how == "fails":
        store.attempts.fail(claim, "no such sampler", ErrorClass.BAD_INPUT)
    else:
        store.attempts.stopped(claim)
    store.backlog.enqueue(1)
    assert charged(database, batch_id) == pytest.approx((1.0, 1.0))
    with database.read() as session:
        assert session.scalars(sa.select(JobRow.charged_seconds)).all() == [None]


def test_jobs_that_a_dispatcher_of_an_older_release_queued_have_no_charge(store: JobStore, database: Database) -> None:
    batch_id = store.submissions.submit("a", "me", 50, some(1))
    change(database, JobRow, JobRow.batch_id == batch_id, state=JobState.QUEUED.value)
    claim = store.leases.claim(f"{batch_id}-1", "w1@host")
    assert claim is not None
    store.attempts.succeed(claim, PICTURE)
    store.backlog.enqueue(1)
    with database.read() as session:
        assert session.get_one(BatchRow, batch_id).virtual_time == 0


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_charge_whose_batch_is_locked_is_corrected_later_and_holds_up_no_pass(
    store: JobStore, database: Database
) -> None:
    batch_id = store.submissions.submit("a", "me", 50, some(1))
    served(store, 1, {batch_id: 7.0})
    with database.write() as session:
        session.get_one(BatchRow, batch_id, with_for_update=True)
        store.backlog.enqueue(1)
        assert charged(database, batch_id) == pytest.approx((1.0, 1.0))
    store.backlog.enqueue(1)
    assert charged(database, batch_id) == pytest.approx((7.0, 7.0))


def test_many_charges_are_corrected_some_at_a_time(
    store: JobStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = store.submissions.submit("a", "me", 50, some(10))
    claims = [store.leases.claim(bell.job_id, "w1@host") for bell in store.backlog.enqueue(10).queued]
    store.attempts.succeed_many([Success(claim, replace(PICTURE, render_seconds=3.0)) for claim in claims if claim])
    monkeypatch.setattr(charges, "MOST", 4)
    store.backlog.enqueue(1)
    assert charged(database, batch_id) == pytest.approx((30.0, 30.0))


def test_another_dispatcher_knows_what_jobs_cost(store: JobStore, database: Database) -> None:
    batch_id = store.submissions.submit("a", "me", 50, some(10))
    served(store, 2, {batch_id: 7.0})
    another_process(database).backlog.enqueue(1)
    assert charged(database, batch_id) == pytest.approx((21.0, 21.0))


def test_what_is_paused_or_deleted_or_not_yet_due_is_passed_over(store: JobStore, database: Database) -> None:
    paused, deleted, owned = (
        store.submissions.submit(name, name, 90, some(2)) for name in ("paused", "deleted", "owner")
    )
    due = store.submissions.submit("due", "me", 50, some(4))
    change(database, BatchRow, BatchRow.id == paused, paused=True)
    change(database, BatchRow, BatchRow.id == deleted, deleted_at=now_plus(sa.literal(0.0)))
    with database.write() as session:
        session.add(OwnerRow(name="owner", paused=True))
    change(database, JobRow, JobRow.id == f"{due}-1", not_before=now_plus(sa.literal(60.0)))
    change(database, JobRow, JobRow.id == f"{due}-2", not_before=now_plus(sa.literal(-1.0)))
    change(database, JobRow, JobRow.id == f"{due}-3", paused=True)
    assert [bell.job_id for bell in store.backlog.enqueue(10).queued] == [f"{due}-2", f"{due}-4"]
    change(database, OwnerRow, OwnerRow.name == "owner", paused=False)
    assert [bell.job_id for bell in store.backlog.enqueue(10).queued] == [f"{owned}-1", f"{owned}-2"]


def test_turns_that_a_batch_can_not_use_go_to_the_others(store: JobStore) -> None:
    short, long = (
        store.submissions.submit("short", "me", 50, some(2)),
        store.submissions.submit("long", "you", 50, some(100)),
    )
    assert Counter(of_batch(bell.job_id) for bell in store.backlog.enqueue(20).queued) == {short: 2, long: 18}


def test_no_more_jobs_of_an_owner_are_queued_than_the_cap(store: JobStore, database: Database) -> None:
    mine, yours = store.submissions.submit("a", "me", 50, some(50)), store.submissions.submit("b", "you", 40, some(50))
    with database.write() as session:
        session.add(OwnerRow(name="me", most_queued=3))
    bells = store.backlog.enqueue(10).queued
    assert Counter(of_batch(bell.job_id) for bell in bells) == {mine: 3, yours: 7}
    store.leases.claim(next(bell.job_id for bell in bells if of_batch(bell.job_id) == mine), "w1@host")
    assert [of_batch(bell.job_id) for bell in store.backlog.enqueue(10).queued] == [mine]
    capped = JobStore.over(database, Settings(database_url="", broker_url="", s3_bucket="", most_queued=1))
    store.submissions.submit("c", "new", 99, some(9))
    assert [of_batch(bell.job_id)[0] for bell in capped.backlog.enqueue(20).queued] == ["c"]


def test_a_batch_that_has_waited_too_long_gets_a_turn_and_counts_as_urgent(store: JobStore, database: Database) -> None:
    low = store.submissions.submit("low", "me", 10, some(10))
    high = store.submissions.submit("high", "you", 80, some(100))
    change(database, BatchRow, BatchRow.id == low, accepted_at=now_plus(sa.literal(-301.0)))
    bells = store.backlog.enqueue(4).queued
    assert [(of_batch(bell.job_id), bell.priority) for bell in bells] == [(low, 80), *[(high, 80)] * 3]
    claim = store.leases.claim(bells[0].job_id, "w1@host")
    assert claim is not None
    assert claim.priority == 80
    # The old batch gets no second turn while its job runs, nor right after that job ends.
    assert [of_batch(bell.job_id) for bell in store.backlog.enqueue(5).queued] == [high, high]
    store.attempts.succeed(claim, PICTURE)
    for bell in bells[1:]:
        store.leases.claim(bell.job_id, "w1@host")
    assert low not in {of_batch(bell.job_id) for bell in store.backlog.enqueue(5).queued}


def test_the_window_is_what_the_live_workers_of_a_model_need(store: JobStore) -> None:
    store.submissions.submit("a", "me", 50, some(500))
    store.submissions.submit("b", "me", 50, some(500, model="other"))
    bells = Counter(bell.model for bell in store.backlog.enqueue(128, slots={"tiny": 16}).queued)
    assert bells == {"tiny": 32, "other": 4}
    assert store.backlog.enqueue(128, slots={"tiny": 16}).queued == []
    assert len(store.backlog.enqueue(40, slots={"tiny": 100}).queued) == 8


def test_urgent_jobs_have_a_window_of_their_own(store: JobStore) -> None:
    store.submissions.submit("bulk", "me", 50, some(500))
    assert len(store.backlog.enqueue(5).queued) == 5
    urgent = store.submissions.submit("urgent", "me", 90, some(7))
    assert [of_batch(bell.job_id) for bell in store.backlog.enqueue(5).queued] == [urgent] * 5
    assert store.backlog.enqueue(5).queued == []


@pytest.mark.parametrize(
    ("query", "indices"),
    [
        (waiting.next_jobs("tiny", "b-1", 10), {"ix_jobs_backlog"}),
        (waiting.in_line("tiny"), {"ix_jobs_backlog", "ix_jobs_batch_id_finished_at"}),
    ],
)
def test_a_pass_reads_no_more_of_the_backlog_than_it_moves(
    store: JobStore, database: Database, query: sa.Select[object], indices: set[str]
) -> None:
    for n in range(30):
        store.submissions.submit(f"b{n}", "me", 50, some(200))
    if database.engine.dialect.name == "postgresql":
        with database.write() as session:
            session.execute(sa.text("ANALYZE"))
    how = plan(database, query)
    assert all(index in how for index in indices), how
    assert "SCAN jobs" not in how or "SCAN jobs USING" in how
    assert "Seq Scan on jobs" not in how
    assert "TEMP B-TREE FOR ORDER BY" not in how or "batches" in how


def test_a_job_is_dispatched_once_by_two_dispatchers_at_once(store: JobStore, database: Database) -> None:
    batch_id = store.submissions.submit("a", "me", 50, some(20))
    other = JobStore.over(database, Settings(database_url="", broker_url="", s3_bucket=""))
    bells = [*store.backlog.enqueue(7).queued, *other.backlog.enqueue(14).queued, *store.backlog.enqueue(30).queued]
    assert [bell.job_id for bell in bells] == [f"{batch_id}-{n}" for n in range(1, 21)]
    assert store.queries.batch(batch_id).counts[JobState.QUEUED] == 20


def test_what_an_owner_is_charged_for_urgent_jobs_is_not_lost_to_the_ordinary_ones(
    store: JobStore, database: Database
) -> None:
    store.submissions.submit("now", "me", 95, some(3))
    store.submissions.submit("later", "me", 50, some(3))
    assert len(store.backlog.enqueue(10).queued) == 6
    with database.read() as session:
        assert session.get_one(OwnerRow, "me").virtual_time == pytest.approx(6.0)

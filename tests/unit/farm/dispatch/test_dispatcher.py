"""The dispatcher's loop and its recovery, through outages and changes of the leader."""

import logging
import threading
from collections.abc import Callable

import pytest
import redis
import sqlalchemy as sa

from farm.dispatch.dispatcher import BUSY_SECONDS, IDLE_SECONDS, Dispatcher
from farm.errors import BrokerUnavailable, DatabaseUnavailable, StorageUnavailable
from farm.jobs.database import now_plus
from farm.jobs.leadership import RENEW_SECONDS, Leadership
from farm.jobs.schema import BatchRow
from farm.jobs.states import JobState
from farm.specs.object_keys import checkpoint_key, preview_key
from tests.unit.farm.dispatch.conftest import LEASE_SECONDS, WORKER, Parts, Turns

PENDING, QUEUED, RUNNING = JobState.PENDING, JobState.QUEUED, JobState.RUNNING
RECOVER_SECONDS = 1.0
"""Half a heartbeat interval."""


def nothing() -> None:
    """A step in which the loop only continues."""


def passes(seconds: float) -> list[Callable[[], None]]:
    """Return enough steps for an idle loop to spend at least that long."""
    return [nothing] * int(seconds / IDLE_SECONDS + 1)


def run(parts: Parts, leadership: Leadership, *steps: Callable[[], object]) -> tuple[Dispatcher, Turns]:
    """Run a dispatcher with a step at each pause, then stop it."""
    dispatcher, turns = parts.dispatcher(), Turns(parts.clock, *steps)
    dispatcher.run(turns, leadership)
    return dispatcher, turns


# --- a pass -------------------------------------------------------------------------------------------------------


def test_a_pass_moves_a_window_of_jobs_and_counts_them(parts: Parts, leadership: Leadership) -> None:
    jobs = parts.submit(6)
    dispatcher, turns = run(parts, leadership, nothing)
    assert parts.states(jobs) == [QUEUED] * 4 + [PENDING] * 2
    assert parts.messages() == set(jobs[:4])
    assert (dispatcher.tally.passes, dispatcher.tally.dispatched) == (2, 4)
    assert turns.pauses == [BUSY_SECONDS, IDLE_SECONDS]


def test_jobs_that_could_not_be_published_are_back_in_the_backlog(parts: Parts) -> None:
    jobs = parts.submit(3)
    parts.broker.away = True
    with pytest.raises(BrokerUnavailable):
        parts.dispatcher().fill()
    assert parts.states(jobs) == [PENDING] * 3
    parts.broker.away = False
    assert parts.dispatcher().fill() == 3


def test_a_dispatcher_told_to_stop_amid_a_pass_completes_it(parts: Parts, leadership: Leadership) -> None:
    jobs = parts.submit(3)
    turns = Turns(parts.clock)
    parts.broker.before_publishing = turns.set
    parts.dispatcher().run(turns, leadership)
    assert parts.states(jobs) == [QUEUED] * 3
    assert parts.messages() == set(jobs)
    assert parts.leader() is None, "it has resigned"


def test_a_dispatcher_that_fails_amid_a_pass_and_stops_leaves_nothing_queued_without_a_message(
    parts: Parts, leadership: Leadership
) -> None:
    jobs = parts.submit(3)
    turns = Turns(parts.clock)

    def stop_and_lose_redis() -> None:
        parts.broker.away = True
        turns.set()

    parts.broker.before_publishing = stop_and_lose_redis
    parts.dispatcher().run(turns, leadership)
    assert parts.states(jobs) == [PENDING] * 3


# --- leadership ---------------------------------------------------------------------------------------------------


def test_a_dispatcher_that_does_not_lead_moves_nothing(parts: Parts, leadership: Leadership) -> None:
    jobs = parts.submit(2)
    parts.give_leadership_to("another")
    dispatcher, turns = run(parts, leadership, nothing, nothing)
    assert parts.states(jobs) == [PENDING] * 2
    assert dispatcher.tally.passes == 0
    assert turns.pauses == [RENEW_SECONDS] * 3
    assert parts.leader() == "another", "it can't resign for another one"


def test_a_dispatcher_takes_over_when_the_leaders_lease_has_run_out(parts: Parts, leadership: Leadership) -> None:
    jobs = parts.submit(2)
    parts.give_leadership_to("another")
    led: list[str | None] = []
    run(parts, leadership, parts.end_leadership, lambda: led.append(parts.leader()))
    assert led == [leadership.holder]
    assert parts.states(jobs) == [QUEUED] * 2


def test_a_dispatcher_that_loses_the_leadership_stops_acting_until_it_regains_it(
    parts: Parts, leadership: Leadership
) -> None:
    jobs = parts.submit(1)
    seen: list[list[JobState]] = []

    def lose() -> None:
        seen.append(parts.states(jobs))
        parts.give_leadership_to("another")
        jobs.extend(parts.submit(1, "while another leads"))

    def regain() -> None:
        seen.append(parts.states(jobs))
        parts.end_leadership()

    run(parts, leadership, lose, nothing, regain, lambda: seen.append(parts.states(jobs)))
    assert seen == [[QUEUED], [QUEUED, PENDING], [QUEUED, QUEUED]]


def test_a_dispatcher_that_stops_lets_another_lead_at_once(parts: Parts, leadership: Leadership) -> None:
    run(parts, leadership)
    assert parts.leader() is None
    assert Leadership(parts.db, "dispatcher").seek()


def test_a_dispatcher_stops_without_the_database_too(
    parts: Parts, leadership: Leadership, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    start, end = parts.sql_outage()
    run(parts, leadership, start)
    end()
    assert caplog.messages[-1] == "dispatcher stopped"
    assert parts.leader() == leadership.holder, "its lease has to run out"


# --- outages of Redis and SQL ---------------------------------------------------------------------------------------


def test_redis_away_is_logged_once_and_waited_for_without_moving_jobs(
    parts: Parts, leadership: Leadership, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    jobs = parts.submit(2)
    parts.broker.away = True

    def come_back() -> None:
        assert parts.states(jobs) == [PENDING] * 2
        assert parts.broker.pings == 2
        parts.broker.away = False

    dispatcher, turns = run(parts, leadership, nothing, nothing, come_back)
    assert parts.states(jobs) == [QUEUED] * 2
    assert turns.pauses == [1.0, 1.0, 1.0, BUSY_SECONDS]
    assert dispatcher.tally.passes == 1
    assert [record.levelname for record in caplog.records].count("ERROR") == 1
    assert "back again, dispatching" in caplog.messages


def test_sql_away_is_logged_once_and_waited_for(
    parts: Parts, leadership: Leadership, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = parts.submit(2)
    start, end = parts.sql_outage()
    start()
    dispatcher, turns = run(parts, leadership, nothing, end)
    assert parts.states(jobs) == [QUEUED] * 2
    assert turns.pauses == [1.0, 1.0, BUSY_SECONDS]
    assert dispatcher.tally.passes == 1
    assert [record.levelname for record in caplog.records].count("ERROR") == 1


def test_a_dispatcher_no_longer_believes_that_it_leads_while_sql_is_away(parts: Parts, leadership: Leadership) -> None:
    assert leadership.seek()
    with parts.sql_is_away(), pytest.raises(DatabaseUnavailable):
        leadership.seek()
    assert not leadership.leads


def test_consecutive_outages_of_two_services_are_logged_for_each(
    parts: Parts, leadership: Leadership, caplog: pytest.LogCaptureFixture
) -> None:
    parts.submit(1)
    parts.broker.away = True
    start, end = parts.sql_outage()
    run(parts, leadership, start, end)
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [error.split()[0] for error in errors] == ["Redis", "the", "Redis"]


def test_after_an_outage_of_sql_workers_have_a_lease_time_before_their_jobs_are_taken(
    parts: Parts, leadership: Leadership
) -> None:
    (job,) = parts.submit(1)
    parts.claim(job)
    parts.shift_lease(job, -1)
    start, end = parts.sql_outage()
    start()
    seen: list[JobState] = []
    steps = [end, *passes(LEASE_SECONDS - 2), lambda: seen.extend(parts.states([job])), *passes(2)]
    dispatcher, _ = run(parts, leadership, *steps)
    assert seen == [RUNNING]
    assert dispatcher.tally.lost_leases == 1
    assert parts.states([job]) == [QUEUED], "lost, and dispatched again"


def test_after_a_pass_in_which_sql_hung_workers_have_a_lease_time_too(parts: Parts, leadership: Leadership) -> None:
    (running,) = parts.submit(1, "running")
    parts.claim(running)
    parts.shift_lease(running, -1)
    parts.submit(1, "published")

    def hang() -> None:
        parts.clock.pass_by(LEASE_SECONDS)

    parts.broker.before_publishing = hang
    dispatcher, _ = run(parts, leadership, *passes(LEASE_SECONDS - 2))
    assert parts.states([running]) == [RUNNING]
    assert dispatcher.tally.lost_leases == 0
    assert dispatcher.tally.pass_seconds >= LEASE_SECONDS


def test_after_an_outage_of_redis_alone_lost_leases_are_noticed_at_once(parts: Parts, leadership: Leadership) -> None:
    running, _ = parts.submit(2)
    parts.claim(running)
    parts.shift_lease(running, -1)
    parts.broker.away = True

    def come_back() -> None:
        assert parts.states([running]) == [RUNNING]
        parts.broker.away = False

    dispatcher, _ = run(parts, leadership, nothing, come_back)
    assert dispatcher.tally.lost_leases == 1


# --- recovery -------------------------------------------------------------------------------------------------------


def test_a_lost_lease_is_recovered_twice_a_beat(parts: Parts, leadership: Leadership) -> None:
    (job,) = parts.submit(1)

    def lose() -> None:
        parts.claim(job)
        parts.shift_lease(job, -1)

    dispatcher, _ = run(parts, leadership, lose, *passes(RECOVER_SECONDS))
    assert dispatcher.tally.lost_leases == 1
    assert parts.store.queries.job(job).lost_leases == 1


def test_a_lost_message_is_missed_for_half_a_lease_time_before_its_job_comes_back(
    parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = parts.submit(3)
    dispatcher = parts.dispatcher()
    assert dispatcher.fill() == 3
    flush(parts)
    assert dispatcher.recover() == 0
    parts.clock.pass_by(LEASE_SECONDS / 2 - 0.1)
    assert dispatcher.recover() == 0
    parts.clock.pass_by(0.1)
    assert dispatcher.recover() == 3
    assert dispatcher.tally.lost_messages == 3
    assert parts.states(jobs) == [PENDING] * 3
    assert all(job in caplog.text for job in jobs)
    assert dispatcher.fill() == 3
    assert parts.messages() == set(jobs)


def test_a_message_that_turns_up_again_is_missed_anew(parts: Parts) -> None:
    (job,) = parts.submit(1)
    dispatcher = parts.dispatcher()
    dispatcher.fill()
    flush(parts)
    dispatcher.recover()
    parts.clock.pass_by(LEASE_SECONDS / 2 - 0.1)
    parts.store.backlog.unqueue([job])
    dispatcher.fill()  # publishes its message again
    assert dispatcher.recover() == 0
    flush(parts)
    parts.clock.pass_by(1)
    assert dispatcher.recover() == 0
    parts.clock.pass_by(LEASE_SECONDS / 2)
    assert dispatcher.recover() == 1


def test_a_job_that_was_claimed_meanwhile_misses_no_message(parts: Parts) -> None:
    (job,) = parts.submit(1)
    dispatcher = parts.dispatcher()
    dispatcher.fill()
    flush(parts)
    dispatcher.recover()
    assert parts.store.leases.claim(job, WORKER.name) is not None
    parts.clock.pass_by(LEASE_SECONDS)
    assert dispatcher.recover() == 0
    assert parts.states([job]) == [RUNNING]


def test_jobs_of_a_dispatcher_that_died_between_commit_and_publication_come_back(parts: Parts) -> None:
    jobs = parts.submit(2)
    parts.store.backlog.enqueue(4)  # the dispatcher dies after its commit
    dispatcher = parts.dispatcher()
    dispatcher.recover()
    parts.clock.pass_by(LEASE_SECONDS / 2)
    assert dispatcher.recover() == 2
    assert dispatcher.fill() == 2
    assert parts.messages() == set(jobs)


def test_recovery_waits_for_redis_before_it_takes_any_message_for_lost(parts: Parts) -> None:
    parts.submit(1)
    dispatcher = parts.dispatcher()
    dispatcher.fill()
    parts.broker.away = True
    with pytest.raises(BrokerUnavailable):
        dispatcher.recover()
    parts.clock.pass_by(LEASE_SECONDS)
    parts.broker.away = False
    assert dispatcher.recover() == 0


def flush(parts: Parts) -> None:
    """Delete everything in Redis."""
    with redis.Redis.from_url(parts.settings.broker_url) as client:
        client.flushall()


# --- sweeping ---------------------------------------------------------------------------------------------------------


def left_behind(parts: Parts) -> tuple[str, list[str]]:
    """Return a job that succeeded in its second attempt, and the objects that its first attempt left in the bucket."""
    (job,) = parts.submit(1)
    claim = parts.claim(job)
    key = checkpoint_key(claim.batch_id, claim.index, claim.attempt)
    keys = [key, preview_key(claim.batch_id, claim.index, claim.attempt)]
    for one in keys:
        parts.storage.put(one, b"x")
    assert parts.store.attempts.record_checkpoint(claim, key)
    parts.shift_lease(job, -1)
    assert parts.store.leases.expire() == 1
    parts.succeed(job)
    return job, keys


def test_leftovers_are_swept_when_their_job_has_ended_long_enough_ago(parts: Parts) -> None:
    job, keys = left_behind(parts)
    dispatcher = parts.dispatcher()
    assert dispatcher.sweep(2 * LEASE_SECONDS) == 0
    assert set(keys) < set(parts.storage.keys())
    parts.shift_end(job, -2 * LEASE_SECONDS - 1)
    assert dispatcher.sweep(2 * LEASE_SECONDS) == 1
    picture = parts.store.queries.job(job).picture
    assert picture is not None
    assert list(parts.storage.keys()) == [picture.key]
    assert dispatcher.sweep() == 0


def test_leftovers_are_swept_again_where_the_object_store_was_away(parts: Parts) -> None:
    _, keys = left_behind(parts)
    dispatcher = parts.dispatcher()
    parts.storage.away = True
    with pytest.raises(StorageUnavailable):
        dispatcher.sweep()
    parts.storage.away = False
    assert dispatcher.sweep() == 1
    assert not set(keys) & set(parts.storage.keys())


def test_a_submission_that_was_broken_off_an_hour_ago_is_discarded(parts: Parts) -> None:
    with parts.db.write() as session:
        for name, ago in (("old", -4e3), ("new", -1e3)):
            created = now_plus(sa.literal(ago))
            session.add(BatchRow(id=name, name=name, owner="me", priority=50, total=0, created_at=created))
    parts.dispatcher().sweep()
    with parts.db.read() as session:
        assert session.scalars(sa.select(BatchRow.id)).all() == ["new"]


def sweep(parts: Parts, leadership: Leadership, *steps: Callable[[], object]) -> Turns:
    """Run the sweeping loop, with a step at each pause."""
    turns = Turns(parts.clock, *steps)
    parts.dispatcher()._sweep_on(turns, leadership)
    return turns


def test_only_the_leader_sweeps(parts: Parts, leadership: Leadership) -> None:
    job, keys = left_behind(parts)
    parts.shift_end(job, -60)
    parts.give_leadership_to("another")
    assert not leadership.seek()

    def lead() -> None:
        assert set(keys) < set(parts.storage.keys())
        parts.end_leadership()
        assert leadership.seek()

    sweep(parts, leadership, nothing, lead)
    assert not set(keys) & set(parts.storage.keys())


def test_batches_end_while_sweeping_fails_and_both_pause(
    parts: Parts, leadership: Leadership, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> int:
        raise StorageUnavailable("the test says so")

    (job,) = parts.submit(1)
    parts.succeed(job)
    batch_id = job.rpartition("-")[0]
    monkeypatch.setattr(Dispatcher, "sweep", broken)
    assert leadership.seek()
    turns = sweep(parts, leadership, nothing)
    assert parts.store.endings.noted(batch_id)
    assert turns.pauses[-1] == 60.0
    assert "can't sweep, trying again in 60 s" in caplog.text


def test_an_error_that_nobody_expected_does_not_end_the_sweeping(
    parts: Parts, leadership: Leadership, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(Dispatcher, "sweep", broken)
    assert leadership.seek()
    assert sweep(parts, leadership, nothing, nothing).pauses == [0.0, 60.0, 60.0]
    assert "ZeroDivisionError" in caplog.text


def test_batches_that_are_deleted_piece_by_piece_are_gone_on_with_at_once(parts: Parts, leadership: Leadership) -> None:
    (job,) = parts.submit(1)
    parts.succeed(job)
    parts.store.deletions.mark(job.rpartition("-")[0])
    assert leadership.seek()
    assert sweep(parts, leadership, nothing, nothing).pauses == [0.0, 0.0, 5.0]
    assert list(parts.storage.keys()) == []


def test_sweeping_and_copying_have_threads_of_their_own(parts: Parts, leadership: Leadership) -> None:
    before = {thread.name for thread in threading.enumerate()}
    names: set[str] = set()
    run(parts, leadership, lambda: names.update(thread.name for thread in threading.enumerate()))
    assert names - before >= {"sweep", "copies-1", "copies-2", "copies-3", "copies-4"}

"""A worker's leases, with a real database and a clock that tests set: 10 s each, renewed every 2 s."""

import threading
from collections.abc import Mapping

import pytest

from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.settings import Settings
from tests.integration.conftest import wait_until
from tests.unit.workers.service.conftest import ELSEWHERE, HERE, Clock, Jobs, UnsteadyDatabase
from workers.render.request import Progress
from workers.service.leases import HeldLeases


class Engine:
    """Records the calls of the leases to the engine and the observer."""

    def __init__(self) -> None:
        self.under_way: dict[str, Progress] = {}
        self.cancelled: list[str] = []
        self.handed_back: list[str] = []
        self.previews: list[Mapping[str, bool]] = []

    def leases(self, store: JobStore, settings: Settings, clock: Clock) -> HeldLeases:
        return HeldLeases(
            store.leases,
            HERE,
            settings,
            progress=lambda: dict(self.under_way),
            cancel=self.cancelled.append,
            hand_back=lambda job_id, _why: self.handed_back.append(job_id),
            previews=self.previews.append,
            clock=clock,
        )


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def leases(database: UnsteadyDatabase, settings: Settings, engine: Engine, clock: Clock) -> HeldLeases:
    return engine.leases(JobStore.over(database, settings), settings, clock)


def test_a_heartbeat_renews_the_lease_to_its_full_length(jobs: Jobs, leases: HeldLeases) -> None:
    job_id = jobs.queued()
    assert leases.claim(job_id) is not None
    jobs.age_lease(job_id, 8)
    leases.renew()
    jobs.age_lease(job_id, 8)
    assert jobs.store.leases.expire() == 0
    jobs.age_lease(job_id, 8)
    assert jobs.store.leases.expire() == 1


def test_a_heartbeat_writes_the_progress_and_keeps_the_last_one_of_a_render_that_left_the_engine(
    jobs: Jobs, leases: HeldLeases, engine: Engine
) -> None:
    job_id = jobs.queued()
    leases.claim(job_id)
    engine.under_way[job_id] = Progress(3, 4, 1.0, 0.25)
    leases.renew()
    engine.under_way.clear()  # its picture is being uploaded
    leases.renew()
    info = jobs.store.queries.job(job_id)
    assert (info.steps_done, info.seconds_per_step) == (3, 0.25)


def test_a_job_that_is_not_queued_any_more_is_not_claimed(jobs: Jobs, leases: HeldLeases) -> None:
    job_id = jobs.queued()
    jobs.store.leases.claim(job_id, ELSEWHERE)
    assert leases.claim(job_id) is None


def test_a_render_whose_lease_was_not_renewed_is_stopped_before_it_runs_out(
    jobs: Jobs, leases: HeldLeases, engine: Engine, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = jobs.queued()
    lease = leases.claim(job_id)
    clock.now += 8
    leases.stop_expiring()
    assert (engine.cancelled, lease.lost) == ([], False)
    clock.now += 0.1  # one heartbeat interval before its end
    leases.stop_expiring()
    leases.stop_expiring()  # repeated, since the render may have entered the engine only now
    assert (engine.cancelled, lease.lost, lease.cancelled) == ([job_id, job_id], True, False)
    assert [text for text in caplog.messages if "lease not renewed" in text] == [
        f"lease not renewed, stopping job_id={job_id}"
    ]


def test_a_renewed_lease_is_as_old_as_the_request_for_its_renewal(
    jobs: Jobs, leases: HeldLeases, engine: Engine, clock: Clock, database: UnsteadyDatabase
) -> None:
    leases.claim(jobs.queued())
    clock.now += 2
    database.before_write = lambda: setattr(clock, "now", clock.now + 5)  # the statement takes 5 s
    leases.renew()
    clock.now += 3
    leases.stop_expiring()
    assert engine.cancelled == []
    clock.now += 0.1  # 8.1 s after the request, 3.1 s after the answer
    leases.stop_expiring()
    assert len(engine.cancelled) == 1


def test_while_sql_is_away_leases_are_not_renewed_and_their_renders_are_stopped_in_time(
    jobs: Jobs, leases: HeldLeases, engine: Engine, clock: Clock, database: UnsteadyDatabase
) -> None:
    lease = leases.claim(jobs.queued())
    database.away = True
    clock.now += 8.1
    leases.renew()
    leases.stop_expiring()
    assert lease.lost
    assert len(engine.cancelled) == 1


def test_an_outage_of_sql_that_is_short_stops_no_render(
    jobs: Jobs, leases: HeldLeases, engine: Engine, clock: Clock, database: UnsteadyDatabase
) -> None:
    lease = leases.claim(jobs.queued())
    database.away = True
    for _ in range(3):
        clock.now += 2
        leases.renew()
        leases.stop_expiring()
    database.away = False
    clock.now += 2
    leases.renew()
    clock.now += 7.9
    leases.stop_expiring()
    assert (engine.cancelled, lease.lost) == ([], False)


def test_a_lease_that_was_claimed_while_the_database_hung_is_renewed_at_once(
    jobs: Jobs, leases: HeldLeases, engine: Engine, clock: Clock, database: UnsteadyDatabase
) -> None:
    job_id = jobs.queued()
    hangs = iter([9.0])
    database.before_write = lambda: setattr(clock, "now", clock.now + next(hangs, 0.0))
    lease = leases.claim(job_id)
    assert lease.renewed_at == clock.now
    leases.stop_expiring()
    assert engine.cancelled == []


def test_a_lease_that_was_lost_while_the_database_hung_is_not_taken_for_renewed(
    jobs: Jobs, leases: HeldLeases, engine: Engine, clock: Clock, database: UnsteadyDatabase
) -> None:
    job_id = jobs.queued()

    def hang() -> None:
        clock.now += 9
        database.before_write = lambda: jobs.taken_by_another_worker(job_id)

    database.before_write = hang
    lease = leases.claim(job_id)
    assert lease is not None
    database.before_write = lambda: None
    leases.stop_expiring()
    assert (engine.cancelled, lease.lost) == ([job_id], True)


def test_a_cancelled_job_is_stopped_with_every_heartbeat_until_its_attempt_ends(
    jobs: Jobs, leases: HeldLeases, engine: Engine
) -> None:
    job_id = jobs.queued()
    lease = leases.claim(job_id)
    jobs.store.steering.cancel(job_id=job_id)
    leases.renew()
    leases.renew()
    assert (engine.cancelled, lease.cancelled, lease.lost) == ([job_id, job_id], True, False)
    leases.release(lease)
    leases.renew()
    assert len(engine.cancelled) == 2


def test_a_paused_job_is_handed_back(jobs: Jobs, leases: HeldLeases, engine: Engine) -> None:
    job_id = jobs.queued()
    lease = leases.claim(job_id)
    jobs.store.steering.pause(job_id=job_id)
    leases.renew()
    assert (engine.handed_back, engine.cancelled, lease.paused) == ([job_id], [], True)


def test_a_job_that_another_worker_took_is_stopped(jobs: Jobs, leases: HeldLeases, engine: Engine) -> None:
    job_id, other = jobs.queued(), jobs.queued()
    lease, kept = leases.claim(job_id), leases.claim(other)
    jobs.taken_by_another_worker(job_id)
    leases.renew()
    assert (engine.cancelled, lease.lost, kept.lost) == ([job_id], True, False)


def test_a_released_lease_is_not_renewed(jobs: Jobs, leases: HeldLeases) -> None:
    job_id = jobs.queued()
    leases.release(leases.claim(job_id))
    before = jobs.store.queries.job(job_id)
    jobs.age_lease(job_id, 8)
    leases.renew()
    jobs.age_lease(job_id, 8)
    assert before.state is JobState.RUNNING
    assert jobs.store.leases.expire() == 1


def test_an_older_attempt_neither_releases_nor_stops_the_newer_one_of_the_same_worker(
    jobs: Jobs, leases: HeldLeases, engine: Engine, clock: Clock
) -> None:
    job_id = jobs.queued()
    older = leases.claim(job_id)
    jobs.lease_runs_out(job_id)
    jobs.store.backlog.enqueue(10)
    clock.now += 8.1
    newer = leases.claim(job_id)
    leases.stop_expiring()
    leases.release(older)
    leases.renew()
    assert (newer.claim.attempt, newer.lost, engine.cancelled) == (2, False, [])
    with leases.renders() as renders:
        assert renders == {}
    engine.under_way[job_id] = Progress(1, 4, 0.5, None)
    with leases.renders() as renders:
        assert set(renders) == {(job_id, 2)}


def test_no_lease_is_released_while_the_renders_are_reported(jobs: Jobs, leases: HeldLeases, engine: Engine) -> None:
    job_id = jobs.queued()
    lease = leases.claim(job_id)
    engine.under_way[job_id] = Progress(1, 4, 0.5, None)
    releasing = threading.Thread(target=leases.release, args=[lease])
    with leases.renders() as renders:
        releasing.start()
        releasing.join(0.05)
        assert releasing.is_alive()
        assert set(renders) == {(job_id, 1)}
    releasing.join()
    with leases.renders() as renders:
        assert renders == {}


def test_the_observer_hears_of_watched_jobs_with_every_heartbeat(
    jobs: Jobs, leases: HeldLeases, engine: Engine
) -> None:
    job_id = jobs.queued()
    leases.claim(job_id)
    leases.renew()
    jobs.store.steering.request_preview(job_id, vae=True)
    leases.renew()
    assert engine.previews == [{}, {job_id: True}]


def test_the_threads_renew_until_they_are_stopped(
    jobs: Jobs, database: UnsteadyDatabase, settings: Settings, engine: Engine, clock: Clock
) -> None:
    quick = settings.model_copy(update={"beat_seconds": 0.02})
    leases = engine.leases(JobStore.over(database, settings), quick, clock)
    job_id = jobs.queued()
    leases.claim(job_id)
    engine.under_way[job_id] = Progress(3, 4, 1.0, 0.25)
    leases.start()
    wait_until(lambda: jobs.store.queries.job(job_id).steps_done == 3, "it is renewed")
    clock.now += 3600
    leases.stop()
    beats = len(engine.previews)
    leases._heartbeat._thread.join(1)
    assert len(engine.previews) == beats

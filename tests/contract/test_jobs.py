"""The guarantees of `JobStore` on every database: each transition, which caller may make it, and late calls."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa

from farm.errors import ErrorClass, NotFound
from farm.jobs.database import Database, now_plus
from farm.jobs.records import Claim, Pace, Picture, Success, WorkerInfo
from farm.jobs.schema import JobRow
from farm.jobs.served_models import ServedModel
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.object_keys import checkpoint_key, image_key, trajectory_keys
from farm.specs.spec import RenderSpec

PICTURE = Picture("b/1.png", "f" * 64, 123, 64, 64, "e" * 64, 1.5, ("cut at 77 tokens",))
WORKER = WorkerInfo("w1@host", "cpu", "float32", 8, "0", (ServedModel("tiny", sha256="e" * 64),))


@pytest.fixture
def store(database: Database) -> JobStore:
    settings = Settings(database_url="", broker_url="", s3_bucket="", max_tries=2, max_lost_leases=3, retry_seconds=0)
    return JobStore.over(database, settings)


@pytest.fixture
def lapse(database: Database) -> Callable[[], None]:
    """Let every lease expire and every queued message become overdue by moving them back one minute."""

    def pass_time() -> None:
        with database.write() as session:
            for column in (JobRow.lease_until, JobRow.queued_at):
                session.execute(
                    sa.update(JobRow).where(column.is_not(None)).values({column: now_plus(sa.literal(-60.0))})
                )

    return pass_time


def some(count: int, **fields: object) -> Iterator[RenderSpec]:
    return (RenderSpec(prompt=f"prompt {n}", **fields) for n in range(1, count + 1))


def claimed(store: JobStore, count: int = 1, worker: str = "w1@host") -> list[Claim]:
    store.submissions.submit("batch", "me", 50, some(count))
    claims = [store.leases.claim(bell.job_id, worker) for bell in store.backlog.enqueue(100).queued]
    return [claim for claim in claims if claim is not None]


def state(store: JobStore, claim: Claim) -> JobState:
    return store.queries.job(claim.job_id).state


def test_a_submitted_batch_is_pending_whole_and_in_order(store: JobStore) -> None:
    specs = list(some(2500))
    status = store.queries.batch(store.submissions.submit("Sea & Sky", "me", 70, specs))
    assert (status.name, status.owner, status.priority, status.total) == ("Sea & Sky", "me", 70, 2500)
    assert status.counts[JobState.PENDING] == 2500
    assert status.id.startswith("sea-sky-")
    jobs = [*store.queries.jobs(status.id, limit=2000), *store.queries.jobs(status.id, after=2000)]
    assert [job.spec for job in jobs] == specs
    assert [job.index for job in jobs] == list(range(1, 2501))
    assert jobs[16].id == f"{status.id}-17"


def test_a_submission_that_breaks_midway_leaves_nothing(store: JobStore) -> None:
    def broken() -> Iterator[RenderSpec]:
        yield from some(1500)
        raise ValueError("the source broke")

    with pytest.raises(ValueError, match="the source broke"):
        store.submissions.submit("half", "me", 50, broken())
    assert store.queries.batches() == []
    assert store.backlog.enqueue(10).queued == []


def test_the_window_bounds_what_is_queued_of_each_model(store: JobStore) -> None:
    store.submissions.submit("a", "me", 50, some(30))
    store.submissions.submit("b", "me", 50, some(30, model="other"))
    bells = store.backlog.enqueue(10).queued
    assert [bell.model for bell in bells].count("tiny") == 10
    assert [bell.model for bell in bells].count("other") == 10
    assert store.backlog.enqueue(10).queued == []
    assert store.overview.waiting_by_model() == {"tiny": 30, "other": 30}
    store.leases.claim(bells[0].job_id, "w1@host")
    assert len(store.backlog.enqueue(10).queued) == 1


def test_a_higher_priority_is_served_first(store: JobStore) -> None:
    store.submissions.submit("low", "me", 10, some(5))
    high = store.submissions.submit("high", "me", 90, some(2))
    assert [bell.job_id for bell in store.backlog.enqueue(3).queued][:2] == [f"{high}-1", f"{high}-2"]


def test_a_doorbell_says_batch_place_prompt_and_model(store: JobStore) -> None:
    store.submissions.submit("sea", "me", 50, [RenderSpec(prompt="a\nlong  prompt " + "x" * 100)])
    (bell,) = store.backlog.enqueue(1).queued
    assert bell.shown.startswith("sea 1/1: a long prompt xxx")
    assert bell.shown.endswith("x… (model tiny)")
    assert len(bell.shown) < 140


def test_a_job_is_claimed_once(store: JobStore) -> None:
    (claim,) = claimed(store)
    assert (claim.attempt, claim.index, claim.total, claim.batch_name) == (1, 1, 1, "batch")
    assert store.leases.claim(claim.job_id, "w2@host") is None
    job = store.queries.job(claim.job_id)
    assert (job.state, job.worker, job.attempt) == (JobState.RUNNING, "w1@host", 1)


def test_a_pending_or_unknown_job_can_not_be_claimed(store: JobStore) -> None:
    batch = store.submissions.submit("batch", "me", 50, some(1))
    assert store.leases.claim(f"{batch}-1", "w1@host") is None
    assert store.leases.claim("nobody-1", "w1@host") is None


def test_a_finished_job_has_its_picture(store: JobStore) -> None:
    (claim,) = claimed(store)
    assert store.attempts.succeed(claim, PICTURE)
    job = store.queries.job(claim.job_id)
    assert job.state is JobState.SUCCEEDED
    assert job.picture == PICTURE
    assert job.steps_done == job.spec.num_inference_steps
    assert store.queries.batch(claim.batch_id).done
    assert [info.id for info in store.queries.finished(claim.batch_id)] == [claim.job_id]


def test_only_the_current_attempt_writes(store: JobStore, lapse: Callable[[], None]) -> None:
    (zombie,) = claimed(store)
    lapse()
    assert store.leases.expire() == 1
    (bell,) = store.backlog.enqueue(1).queued
    claim = store.leases.claim(bell.job_id, "w2@host")
    assert claim is not None
    assert claim.attempt == 2
    for late in (
        store.attempts.succeed(zombie, PICTURE),
        store.attempts.fail(zombie, "no", ErrorClass.BAD_INPUT),
        store.attempts.hand_back(zombie),
        store.attempts.stopped(zombie),
    ):
        assert not late
    assert store.leases.beat("w1@host", {(zombie.job_id, zombie.attempt): Pace(9, None)}).lost == {zombie.job_id}
    assert store.queries.job(claim.job_id).steps_done == 0
    assert store.attempts.succeed(claim, PICTURE)


@pytest.mark.parametrize("ending", ["succeed", "fail", "cancel"])
def test_a_terminal_state_never_changes(store: JobStore, lapse: Callable[[], None], ending: str) -> None:
    (claim,) = claimed(store)
    if ending == "succeed":
        store.attempts.succeed(claim, PICTURE)
    elif ending == "fail":
        store.attempts.fail(claim, "bad spec", ErrorClass.BAD_INPUT)
    else:
        store.steering.cancel(job_id=claim.job_id)
        store.attempts.stopped(claim)
    before = store.queries.job(claim.job_id)
    assert before.state.terminal
    lapse()
    assert store.steering.cancel(batch_id=claim.batch_id) == 0
    assert store.leases.expire() == 0
    assert store.backlog.unqueue([claim.job_id]) == 0
    assert store.leases.claim(claim.job_id, "w2@host") is None
    assert not store.attempts.fail(claim, "again", ErrorClass.TRANSIENT)
    assert not store.attempts.succeed(claim, replace(PICTURE, key="other"))
    assert replace(store.queries.job(claim.job_id), queued_at=None) == replace(before, queued_at=None)


def test_an_expired_lease_is_requeued_once_and_costs_no_try(store: JobStore, lapse: Callable[[], None]) -> None:
    (claim,) = claimed(store)
    assert store.leases.expire() == 0
    lapse()
    assert store.leases.expire() == 1
    assert store.leases.expire() == 0
    job = store.queries.job(claim.job_id)
    assert (job.state, job.tries, job.worker) == (JobState.PENDING, 0, None)


def test_a_renewed_lease_does_not_expire(store: JobStore, lapse: Callable[[], None]) -> None:
    first, second = claimed(store, 2)
    lapse()
    beat = store.leases.beat("w1@host", {(first.job_id, first.attempt): Pace(7, 0.5)})
    assert not beat.lost
    assert not beat.cancelled
    assert store.leases.expire() == 1
    assert state(store, first) is JobState.RUNNING
    assert store.queries.job(first.job_id).steps_done == 7
    assert state(store, second) is JobState.PENDING


def test_a_job_that_keeps_losing_its_worker_is_set_aside(store: JobStore, lapse: Callable[[], None]) -> None:
    (claim,) = claimed(store)
    for _ in range(3):
        lapse()
        store.leases.expire()
        for bell in store.backlog.enqueue(1).queued:
            store.leases.claim(bell.job_id, "w1@host")
    job = store.queries.job(claim.job_id)
    assert job.state is JobState.FAILED
    assert "set aside" in (job.error or "")


def test_an_error_is_tried_again_until_the_tries_are_used_up(store: JobStore) -> None:
    (claim,) = claimed(store)
    assert store.attempts.fail(claim, "S3 hiccup", ErrorClass.TRANSIENT)
    assert state(store, claim) is JobState.PENDING
    (bell,) = store.backlog.enqueue(1).queued
    again = store.leases.claim(bell.job_id, "w1@host")
    assert again is not None
    assert store.attempts.fail(again, "S3 hiccup again", ErrorClass.TRANSIENT)
    job = store.queries.job(claim.job_id)
    assert (job.state, job.tries, job.error) == (JobState.FAILED, 2, "S3 hiccup again")


def test_an_error_that_no_other_try_can_help_fails_at_once(store: JobStore) -> None:
    (claim,) = claimed(store)
    store.attempts.fail(claim, "bad spec", ErrorClass.BAD_INPUT)
    assert state(store, claim) is JobState.FAILED


def test_a_job_handed_back_costs_nothing_and_goes_to_the_front_of_its_batch(store: JobStore) -> None:
    store.submissions.submit("batch", "me", 50, some(9))
    first, *_ = [store.leases.claim(bell.job_id, "w1@host") for bell in store.backlog.enqueue(5).queued]
    assert first is not None
    assert store.attempts.hand_back(first)
    assert store.queries.job(first.job_id).tries == 0
    assert store.backlog.enqueue(1).queued[0].job_id == first.job_id


def test_a_cancel_ends_what_waits_and_marks_what_runs(store: JobStore) -> None:
    batch = store.submissions.submit("batch", "me", 50, some(3))
    bells = store.backlog.enqueue(2).queued
    claim = store.leases.claim(bells[0].job_id, "w1@host")
    assert claim is not None
    assert store.steering.cancel(batch_id=batch) == 3
    counts = store.queries.batch(batch).counts
    assert (counts[JobState.CANCELLED], counts[JobState.RUNNING]) == (2, 1)
    assert store.leases.claim(bells[1].job_id, "w2@host") is None
    assert store.leases.beat("w1@host", {(claim.job_id, 1): Pace(2, None)}).cancelled == {claim.job_id}
    assert store.attempts.stopped(claim)
    assert store.queries.batch(batch).counts[JobState.CANCELLED] == 3


@pytest.mark.parametrize("how", ["hand_back", "fail", "expire"])
def test_a_cancelled_render_never_goes_back_to_the_backlog(
    store: JobStore, lapse: Callable[[], None], how: str
) -> None:
    (claim,) = claimed(store)
    store.steering.cancel(job_id=claim.job_id)
    if how == "hand_back":
        store.attempts.hand_back(claim)
    elif how == "fail":
        store.attempts.fail(claim, "hiccup", ErrorClass.TRANSIENT)
    else:
        lapse()
        store.leases.expire()
    assert state(store, claim) is JobState.CANCELLED


def again(store: JobStore, claim: Claim) -> Claim:
    """Claim the next attempt of a job that went back to the backlog."""
    (bell,) = store.backlog.enqueue(100).queued
    assert bell.job_id == claim.job_id
    following = store.leases.claim(bell.job_id, "w2@host")
    assert following is not None
    return following


@pytest.mark.parametrize("how", ["hand_back", "expire", "restart"])
def test_an_attempt_after_a_lost_worker_goes_on_from_the_checkpoint(
    store: JobStore, lapse: Callable[[], None], how: str
) -> None:
    (claim,) = claimed(store)
    assert (claim.priority, claim.checkpoint_key) == (50, None)
    assert store.attempts.record_checkpoint(claim, "b/1.a1.checkpoint.safetensors")
    if how == "hand_back":
        store.attempts.hand_back(claim)
    elif how == "restart":
        store.leases.reclaim("w1@host")
    else:
        lapse()
        store.leases.expire()
    following = again(store, claim)
    assert (following.attempt, following.checkpoint_key) == (2, "b/1.a1.checkpoint.safetensors")
    assert store.leftovers.find() == []


def test_a_try_after_an_error_starts_afresh(store: JobStore) -> None:
    (claim,) = claimed(store)
    store.attempts.record_checkpoint(claim, "b/1.a1.checkpoint.safetensors")
    store.attempts.fail(claim, "hiccup", ErrorClass.TRANSIENT)
    assert again(store, claim).checkpoint_key is None


def test_only_the_current_attempt_leaves_a_checkpoint(store: JobStore) -> None:
    (zombie,) = claimed(store)
    store.attempts.hand_back(zombie)
    claim = again(store, zombie)
    assert not store.attempts.record_checkpoint(zombie, "zombie")
    store.attempts.hand_back(claim)
    assert not store.attempts.record_checkpoint(claim, "too late")
    assert again(store, claim).checkpoint_key is None


def test_a_success_that_is_recorded_again_since_its_answer_was_lost_is_one_still(store: JobStore) -> None:
    first, second = claimed(store, 2)
    mine, other = replace(PICTURE, key="b/1.png"), replace(PICTURE, key="b/2.png")
    assert store.attempts.succeed(first, mine)
    assert store.attempts.succeed(first, mine)
    assert store.attempts.succeed_many([Success(first, mine), Success(second, other)]) == {first.job_id, second.job_id}
    assert not store.attempts.succeed(first, other)
    assert store.queries.job(first.job_id).picture.key == "b/1.png"
    assert [len(store.queries.attempts(claim.job_id)) for claim in (first, second)] == [1, 1]


def test_what_a_job_left_is_not_swept_before_it_has_settled(store: JobStore) -> None:
    (claim,) = claimed(store)
    store.attempts.record_checkpoint(claim, "b/1.a1.checkpoint.safetensors")
    store.attempts.succeed(claim, PICTURE)
    assert store.leftovers.find(settled_seconds=60) == []
    assert len(store.leftovers.find()) == 1


def test_a_job_that_succeeded_at_once_leaves_nothing_to_sweep(store: JobStore) -> None:
    (claim,) = claimed(store)
    store.attempts.succeed(claim, PICTURE)
    assert store.leftovers.find() == []


def test_a_job_that_succeeded_later_leaves_what_its_attempts_wrote_but_not_its_picture(store: JobStore) -> None:
    (lost,) = claimed(store)
    store.attempts.hand_back(lost)
    claim = again(store, lost)
    key = image_key(claim.batch_id, claim.index, 2, claim.spec.prompt)
    store.attempts.succeed(claim, replace(PICTURE, key=key))
    ((job_id, keys),) = store.leftovers.find()
    assert job_id == claim.job_id
    lost_picture = image_key(claim.batch_id, claim.index, 1, claim.spec.prompt)
    assert {checkpoint_key(claim.batch_id, claim.index, attempt) for attempt in (1, 2)} < set(keys)
    assert {lost_picture, *trajectory_keys(lost_picture)} < set(keys)
    assert key not in keys
    assert not set(trajectory_keys(key)) & set(keys)


@pytest.mark.parametrize("how", ["fail", "fail_cancelled", "stop", "cancel_waiting", "set_aside"])
def test_a_job_that_ends_otherwise_is_swept_once(store: JobStore, lapse: Callable[[], None], how: str) -> None:
    (claim,) = claimed(store)
    store.attempts.record_checkpoint(claim, "b/1.a1.checkpoint.safetensors")
    if how == "fail":
        store.attempts.fail(claim, "bad spec", ErrorClass.BAD_INPUT)
    elif how == "fail_cancelled":
        store.steering.cancel(job_id=claim.job_id)
        store.attempts.fail(claim, "hiccup", ErrorClass.TRANSIENT)
    elif how == "stop":
        store.steering.cancel(job_id=claim.job_id)
        store.attempts.stopped(claim)
    elif how == "cancel_waiting":
        store.attempts.hand_back(claim)
        store.steering.cancel(job_id=claim.job_id)
    else:
        for _ in range(3):
            lapse()
            store.leases.expire()
            for bell in store.backlog.enqueue(1).queued:
                store.leases.claim(bell.job_id, "w1@host")
    assert state(store, claim).terminal
    ((job_id, keys),) = store.leftovers.find()
    assert job_id == claim.job_id
    assert checkpoint_key(claim.batch_id, claim.index, 1) in keys
    store.leftovers.swept([claim.job_id])
    assert store.leftovers.find() == []


def test_a_checkpoint_that_is_still_needed_is_never_forgotten(store: JobStore) -> None:
    (claim,) = claimed(store)
    store.attempts.record_checkpoint(claim, "b/1.a1.checkpoint.safetensors")
    store.leftovers.swept([claim.job_id])
    store.attempts.hand_back(claim)
    store.leftovers.swept([claim.job_id])
    assert again(store, claim).checkpoint_key == "b/1.a1.checkpoint.safetensors"


def test_a_beat_writes_each_jobs_pace_and_so_how_long_it_still_takes(store: JobStore) -> None:
    first, second, third = claimed(store, 3)
    store.leases.beat("w1@host", {(first.job_id, 1): Pace(5, 0.5), (second.job_id, 1): Pace(3, None)})
    one, other, untouched = (store.queries.job(claim.job_id) for claim in (first, second, third))
    assert (one.steps_done, one.seconds_per_step, one.eta_seconds) == (5, 0.5, (25 - 5) * 0.5)
    assert (other.steps_done, other.seconds_per_step, other.eta_seconds) == (3, None, None)
    assert (untouched.steps_done, untouched.seconds_per_step) == (0, None)
    store.attempts.succeed(first, PICTURE)
    done = store.queries.job(first.job_id)
    assert (done.seconds_per_step, done.eta_seconds) == (0.5, None)


def test_a_beat_says_which_jobs_are_watched_and_how_until_the_wish_lapses(store: JobStore) -> None:
    first, second, third = claimed(store, 3)
    beat = {(claim.job_id, 1): Pace(1, 0.1) for claim in (first, second, third)}
    assert store.leases.beat("w1@host", beat).previews == {}
    assert store.steering.request_preview(first.job_id, vae=False)
    assert store.steering.request_preview(second.job_id, vae=True)
    assert store.leases.beat("w1@host", beat).previews == {first.job_id: False, second.job_id: True}
    assert store.steering.request_preview(first.job_id, vae=True)
    assert store.steering.request_preview(second.job_id, vae=True, seconds=-1)
    assert store.leases.beat("w1@host", beat).previews == {first.job_id: True}


def test_a_wish_to_watch_waits_for_a_job_and_is_refused_by_one_that_ended(store: JobStore) -> None:
    batch = store.submissions.submit("batch", "me", 50, some(1))
    assert store.steering.request_preview(f"{batch}-1", vae=True)
    claim = store.leases.claim(store.backlog.enqueue(1).queued[0].job_id, "w1@host")
    assert claim is not None
    assert store.leases.beat("w1@host", {(claim.job_id, 1): Pace(0, None)}).previews == {claim.job_id: True}
    store.attempts.succeed(claim, PICTURE)
    assert not store.steering.request_preview(claim.job_id, vae=True)
    assert not store.steering.request_preview("nobody-1", vae=True)


def test_queued_jobs_go_back_to_the_backlog_when_their_messages_are_gone(store: JobStore) -> None:
    store.submissions.submit("batch", "me", 50, some(3))
    ids = [bell.job_id for bell in store.backlog.enqueue(3).queued]
    assert sorted(store.backlog.queued("tiny")) == sorted(ids)
    assert store.backlog.unqueue(ids[1:]) == 2
    assert store.backlog.unqueue(ids[1:]) == 0
    assert [bell.job_id for bell in store.backlog.enqueue(3).queued] == ids[1:]


def test_a_worker_that_starts_again_gives_back_what_it_had_left(store: JobStore) -> None:
    mine, other = claimed(store, 2)
    with_other = store.attempts.hand_back(other) and store.leases.claim(
        store.backlog.enqueue(1).queued[0].job_id, "w2@host"
    )
    assert with_other
    assert store.leases.reclaim("w1@host") == 1
    assert state(store, mine) is JobState.PENDING
    assert state(store, other) is JobState.RUNNING


def test_workers_are_known_while_they_beat(store: JobStore, database: Database) -> None:
    store.workers.register(WORKER)
    (known,) = store.workers.all()
    assert known.alive
    assert known.models == WORKER.models
    with database.write() as session:
        session.execute(sa.text("UPDATE workers SET seen_at = '2000-01-01 00:00:00.000000'"))
    assert not store.workers.all()[0].alive
    store.leases.beat("w1@host", {})
    assert store.workers.all()[0].alive
    store.workers.deregister("w1@host")
    assert store.workers.all() == []


def test_a_batch_is_found_by_id_or_as_the_newest_of_its_name(store: JobStore) -> None:
    first = store.submissions.submit("sea", "me", 50, some(1))
    second = store.submissions.submit("sea", "me", 50, some(1))
    assert store.queries.batch("sea").id == second
    assert store.queries.batch(first).id == first
    assert [status.id for status in store.queries.batches()] == [second, first]
    with pytest.raises(NotFound):
        store.queries.batch("land")
    with pytest.raises(NotFound):
        store.queries.job("land-1")


def test_prompts_are_only_data(store: JobStore) -> None:
    nasty = "'; DROP TABLE jobs; -- \\ \" %s {} \u2028 🎨 ￿"
    batch = store.submissions.submit(nasty[:200], "me", 50, [RenderSpec(prompt=nasty)])
    assert store.queries.jobs(batch)[0].spec.prompt == nasty
    assert store.queries.batch(batch).name == nasty

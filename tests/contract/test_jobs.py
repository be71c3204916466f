"""What `JobStore` promises, on every database: each move of a job, who may make it, and who comes too late."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa

from farm.errors import ErrorClass, NotFound
from farm.jobs.database import Database, now_plus
from farm.jobs.records import Claim, Pace, Picture, WorkerInfo
from farm.jobs.schema import JobRow
from farm.jobs.served_models import ServedModel
from farm.jobs.states import TRANSITIONS, JobState
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.object_keys import checkpoint_key, image_key, trajectory_keys
from farm.specs.spec import RenderSpec

PICTURE = Picture("b/1.png", "f" * 64, 123, 64, 64, "e" * 64, 1.5, ("cut at 77 tokens",))
WORKER = WorkerInfo("w1@host", "cpu", "float32", 8, "0", (ServedModel("tiny", sha256="e" * 64),))


@pytest.fixture
def store(database: Database) -> JobStore:
    settings = Settings(database_url="", broker_url="", s3_bucket="", max_tries=2, max_lost_leases=3, retry_seconds=0)
    return JobStore(database, settings)


@pytest.fixture
def lapse(database: Database) -> Callable[[], None]:
    """Lets a minute pass for every lease and every queued job."""

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
    store.submit("batch", "me", 50, some(count))
    claims = [store.claim(bell.job_id, worker) for bell in store.enqueue(100)]
    return [claim for claim in claims if claim is not None]


def state(store: JobStore, claim: Claim) -> JobState:
    return store.job(claim.job_id).state


def test_a_submitted_batch_is_pending_whole_and_in_order(store: JobStore) -> None:
    specs = list(some(2500))
    status = store.batch(store.submit("Sea & Sky", "me", 70, specs))
    assert (status.name, status.owner, status.priority, status.total) == ("Sea & Sky", "me", 70, 2500)
    assert status.counts[JobState.PENDING] == 2500
    assert status.id.startswith("sea-sky-")
    jobs = [*store.jobs(status.id, limit=2000), *store.jobs(status.id, after=2000)]
    assert [job.spec for job in jobs] == specs
    assert [job.index for job in jobs] == list(range(1, 2501))
    assert jobs[16].id == f"{status.id}-17"


def test_a_submission_that_breaks_midway_leaves_nothing(store: JobStore) -> None:
    def broken() -> Iterator[RenderSpec]:
        yield from some(1500)
        raise ValueError("the source broke")

    with pytest.raises(ValueError, match="the source broke"):
        store.submit("half", "me", 50, broken())
    assert store.batches() == []
    assert store.enqueue(10) == []


def test_the_window_bounds_what_is_queued_of_each_model(store: JobStore) -> None:
    store.submit("a", "me", 50, some(30))
    store.submit("b", "me", 50, some(30, model="other"))
    bells = store.enqueue(10)
    assert [bell.model for bell in bells].count("tiny") == 10
    assert [bell.model for bell in bells].count("other") == 10
    assert store.enqueue(10) == []
    assert store.waiting_by_model() == {"tiny": 30, "other": 30}
    store.claim(bells[0].job_id, "w1@host")
    assert len(store.enqueue(10)) == 1


def test_a_higher_priority_is_served_first(store: JobStore) -> None:
    store.submit("low", "me", 10, some(5))
    high = store.submit("high", "me", 90, some(2))
    assert [bell.job_id for bell in store.enqueue(3)][:2] == [f"{high}-1", f"{high}-2"]


def test_a_doorbell_says_batch_place_prompt_and_model(store: JobStore) -> None:
    store.submit("sea", "me", 50, [RenderSpec(prompt="a\nlong  prompt " + "x" * 100)])
    (bell,) = store.enqueue(1)
    assert bell.shown.startswith("sea 1/1: a long prompt xxx")
    assert bell.shown.endswith("x… (model tiny)")
    assert len(bell.shown) < 140


def test_a_job_is_claimed_once(store: JobStore) -> None:
    (claim,) = claimed(store)
    assert (claim.attempt, claim.index, claim.total, claim.batch_name) == (1, 1, 1, "batch")
    assert store.claim(claim.job_id, "w2@host") is None
    job = store.job(claim.job_id)
    assert (job.state, job.worker, job.attempt) == (JobState.RUNNING, "w1@host", 1)


def test_a_pending_or_unknown_job_can_not_be_claimed(store: JobStore) -> None:
    batch = store.submit("batch", "me", 50, some(1))
    assert store.claim(f"{batch}-1", "w1@host") is None
    assert store.claim("nobody-1", "w1@host") is None


def test_a_finished_job_has_its_picture(store: JobStore) -> None:
    (claim,) = claimed(store)
    assert store.succeed(claim, PICTURE)
    job = store.job(claim.job_id)
    assert job.state is JobState.SUCCEEDED
    assert job.picture == PICTURE
    assert job.steps_done == job.spec.num_inference_steps
    assert store.batch(claim.batch_id).done
    assert [info.id for info in store.finished(claim.batch_id)] == [claim.job_id]


def test_only_the_current_attempt_writes(store: JobStore, lapse: Callable[[], None]) -> None:
    (zombie,) = claimed(store)
    lapse()
    assert store.expire_leases() == 1
    (bell,) = store.enqueue(1)
    claim = store.claim(bell.job_id, "w2@host")
    assert claim is not None
    assert claim.attempt == 2
    for late in (
        store.succeed(zombie, PICTURE),
        store.fail(zombie, "no", ErrorClass.BAD_INPUT),
        store.hand_back(zombie),
        store.stopped(zombie),
    ):
        assert not late
    assert store.beat("w1@host", {(zombie.job_id, zombie.attempt): Pace(9, None)}).lost == {zombie.job_id}
    assert store.job(claim.job_id).steps_done == 0
    assert store.succeed(claim, PICTURE)


@pytest.mark.parametrize("ending", ["succeed", "fail", "cancel"])
def test_a_terminal_state_never_changes(store: JobStore, lapse: Callable[[], None], ending: str) -> None:
    (claim,) = claimed(store)
    if ending == "succeed":
        store.succeed(claim, PICTURE)
    elif ending == "fail":
        store.fail(claim, "bad spec", ErrorClass.BAD_INPUT)
    else:
        store.cancel(job_id=claim.job_id)
        store.stopped(claim)
    before = store.job(claim.job_id)
    assert before.state.terminal
    lapse()
    assert store.cancel(batch_id=claim.batch_id) == 0
    assert store.expire_leases() == 0
    assert store.unqueue([claim.job_id]) == 0
    assert store.claim(claim.job_id, "w2@host") is None
    assert not store.fail(claim, "again", ErrorClass.TRANSIENT)
    assert not store.succeed(claim, replace(PICTURE, key="other"))
    assert replace(store.job(claim.job_id), queued_at=None) == replace(before, queued_at=None)


def test_an_expired_lease_is_requeued_once_and_costs_no_try(store: JobStore, lapse: Callable[[], None]) -> None:
    (claim,) = claimed(store)
    assert store.expire_leases() == 0
    lapse()
    assert store.expire_leases() == 1
    assert store.expire_leases() == 0
    job = store.job(claim.job_id)
    assert (job.state, job.tries, job.worker) == (JobState.PENDING, 0, None)


def test_a_renewed_lease_does_not_expire(store: JobStore, lapse: Callable[[], None]) -> None:
    first, second = claimed(store, 2)
    lapse()
    beat = store.beat("w1@host", {(first.job_id, first.attempt): Pace(7, 0.5)})
    assert not beat.lost
    assert not beat.cancelled
    assert store.expire_leases() == 1
    assert state(store, first) is JobState.RUNNING
    assert store.job(first.job_id).steps_done == 7
    assert state(store, second) is JobState.PENDING


def test_a_job_that_keeps_losing_its_worker_is_set_aside(store: JobStore, lapse: Callable[[], None]) -> None:
    (claim,) = claimed(store)
    for _ in range(3):
        lapse()
        store.expire_leases()
        for bell in store.enqueue(1):
            store.claim(bell.job_id, "w1@host")
    job = store.job(claim.job_id)
    assert job.state is JobState.FAILED
    assert "set aside" in (job.error or "")


def test_an_error_is_tried_again_until_the_tries_are_used_up(store: JobStore) -> None:
    (claim,) = claimed(store)
    assert store.fail(claim, "S3 hiccup", ErrorClass.TRANSIENT)
    assert state(store, claim) is JobState.PENDING
    (bell,) = store.enqueue(1)
    again = store.claim(bell.job_id, "w1@host")
    assert again is not None
    assert store.fail(again, "S3 hiccup again", ErrorClass.TRANSIENT)
    job = store.job(claim.job_id)
    assert (job.state, job.tries, job.error) == (JobState.FAILED, 2, "S3 hiccup again")


def test_an_error_that_no_other_try_can_help_fails_at_once(store: JobStore) -> None:
    (claim,) = claimed(store)
    store.fail(claim, "bad spec", ErrorClass.BAD_INPUT)
    assert state(store, claim) is JobState.FAILED


def test_a_job_handed_back_costs_nothing_and_goes_to_the_front_of_its_batch(store: JobStore) -> None:
    store.submit("batch", "me", 50, some(9))
    first, *_ = [store.claim(bell.job_id, "w1@host") for bell in store.enqueue(5)]
    assert first is not None
    assert store.hand_back(first)
    assert store.job(first.job_id).tries == 0
    assert store.enqueue(1)[0].job_id == first.job_id


def test_a_cancel_ends_what_waits_and_marks_what_runs(store: JobStore) -> None:
    batch = store.submit("batch", "me", 50, some(3))
    bells = store.enqueue(2)
    claim = store.claim(bells[0].job_id, "w1@host")
    assert claim is not None
    assert store.cancel(batch_id=batch) == 3
    counts = store.batch(batch).counts
    assert (counts[JobState.CANCELLED], counts[JobState.RUNNING]) == (2, 1)
    assert store.claim(bells[1].job_id, "w2@host") is None
    assert store.beat("w1@host", {(claim.job_id, 1): Pace(2, None)}).cancelled == {claim.job_id}
    assert store.stopped(claim)
    assert store.batch(batch).counts[JobState.CANCELLED] == 3


@pytest.mark.parametrize("how", ["hand_back", "fail", "expire"])
def test_a_cancelled_render_never_goes_back_to_the_backlog(
    store: JobStore, lapse: Callable[[], None], how: str
) -> None:
    (claim,) = claimed(store)
    store.cancel(job_id=claim.job_id)
    if how == "hand_back":
        store.hand_back(claim)
    elif how == "fail":
        store.fail(claim, "hiccup", ErrorClass.TRANSIENT)
    else:
        lapse()
        store.expire_leases()
    assert state(store, claim) is JobState.CANCELLED


def again(store: JobStore, claim: Claim) -> Claim:
    """The next attempt of a job that went back to the backlog."""
    (bell,) = store.enqueue(100)
    assert bell.job_id == claim.job_id
    following = store.claim(bell.job_id, "w2@host")
    assert following is not None
    return following


@pytest.mark.parametrize("how", ["hand_back", "expire", "restart"])
def test_an_attempt_after_a_lost_worker_goes_on_from_the_checkpoint(
    store: JobStore, lapse: Callable[[], None], how: str
) -> None:
    (claim,) = claimed(store)
    assert (claim.priority, claim.checkpoint_key) == (50, None)
    assert store.checkpointed(claim, "b/1.a1.checkpoint.safetensors")
    if how == "hand_back":
        store.hand_back(claim)
    elif how == "restart":
        store.introduce(WORKER)
    else:
        lapse()
        store.expire_leases()
    following = again(store, claim)
    assert (following.attempt, following.checkpoint_key) == (2, "b/1.a1.checkpoint.safetensors")
    assert store.leftovers() == []


def test_a_try_after_an_error_starts_afresh(store: JobStore) -> None:
    (claim,) = claimed(store)
    store.checkpointed(claim, "b/1.a1.checkpoint.safetensors")
    store.fail(claim, "hiccup", ErrorClass.TRANSIENT)
    assert again(store, claim).checkpoint_key is None


def test_only_the_current_attempt_leaves_a_checkpoint(store: JobStore) -> None:
    (zombie,) = claimed(store)
    store.hand_back(zombie)
    claim = again(store, zombie)
    assert not store.checkpointed(zombie, "zombie")
    store.hand_back(claim)
    assert not store.checkpointed(claim, "too late")
    assert again(store, claim).checkpoint_key is None


def test_a_success_that_is_recorded_again_since_its_answer_was_lost_is_one_still(store: JobStore) -> None:
    first, second = claimed(store, 2)
    mine, other = replace(PICTURE, key="b/1.png"), replace(PICTURE, key="b/2.png")
    assert store.succeed(first, mine)
    assert store.succeed(first, mine)
    assert store.succeed_many([(first, mine), (second, other)]) == {first.job_id, second.job_id}
    assert not store.succeed(first, other)
    assert store.job(first.job_id).picture.key == "b/1.png"
    assert [len(store.attempts(claim.job_id)) for claim in (first, second)] == [1, 1]


def test_what_a_job_left_is_not_swept_before_it_has_settled(store: JobStore) -> None:
    (claim,) = claimed(store)
    store.checkpointed(claim, "b/1.a1.checkpoint.safetensors")
    store.succeed(claim, PICTURE)
    assert store.leftovers(settled_seconds=60) == []
    assert len(store.leftovers()) == 1


def test_a_job_that_succeeded_at_once_leaves_nothing_to_sweep(store: JobStore) -> None:
    (claim,) = claimed(store)
    store.succeed(claim, PICTURE)
    assert store.leftovers() == []


def test_a_job_that_succeeded_later_leaves_what_its_attempts_wrote_but_not_its_picture(store: JobStore) -> None:
    (lost,) = claimed(store)
    store.hand_back(lost)
    claim = again(store, lost)
    key = image_key(claim.batch_id, claim.index, 2, claim.spec.prompt)
    store.succeed(claim, replace(PICTURE, key=key))
    ((job_id, keys),) = store.leftovers()
    assert job_id == claim.job_id
    lost_picture = image_key(claim.batch_id, claim.index, 1, claim.spec.prompt)
    assert {checkpoint_key(claim.batch_id, claim.index, attempt) for attempt in (1, 2)} < set(keys)
    assert {lost_picture, *trajectory_keys(lost_picture)} < set(keys)
    assert key not in keys
    assert not set(trajectory_keys(key)) & set(keys)


@pytest.mark.parametrize("how", ["fail", "fail_cancelled", "stop", "cancel_waiting", "set_aside"])
def test_a_job_that_ends_otherwise_is_swept_once(store: JobStore, lapse: Callable[[], None], how: str) -> None:
    (claim,) = claimed(store)
    store.checkpointed(claim, "b/1.a1.checkpoint.safetensors")
    if how == "fail":
        store.fail(claim, "bad spec", ErrorClass.BAD_INPUT)
    elif how == "fail_cancelled":
        store.cancel(job_id=claim.job_id)
        store.fail(claim, "hiccup", ErrorClass.TRANSIENT)
    elif how == "stop":
        store.cancel(job_id=claim.job_id)
        store.stopped(claim)
    elif how == "cancel_waiting":
        store.hand_back(claim)
        store.cancel(job_id=claim.job_id)
    else:
        for _ in range(3):
            lapse()
            store.expire_leases()
            for bell in store.enqueue(1):
                store.claim(bell.job_id, "w1@host")
    assert state(store, claim).terminal
    ((job_id, keys),) = store.leftovers()
    assert job_id == claim.job_id
    assert checkpoint_key(claim.batch_id, claim.index, 1) in keys
    store.forget_leftovers([claim.job_id])
    assert store.leftovers() == []


def test_a_checkpoint_that_is_still_needed_is_never_forgotten(store: JobStore) -> None:
    (claim,) = claimed(store)
    store.checkpointed(claim, "b/1.a1.checkpoint.safetensors")
    store.forget_leftovers([claim.job_id])
    store.hand_back(claim)
    store.forget_leftovers([claim.job_id])
    assert again(store, claim).checkpoint_key == "b/1.a1.checkpoint.safetensors"


def test_a_beat_writes_each_jobs_pace_and_so_how_long_it_still_takes(store: JobStore) -> None:
    first, second, third = claimed(store, 3)
    store.beat("w1@host", {(first.job_id, 1): Pace(5, 0.5), (second.job_id, 1): Pace(3, None)})
    one, other, untouched = (store.job(claim.job_id) for claim in (first, second, third))
    assert (one.steps_done, one.seconds_per_step, one.eta_seconds) == (5, 0.5, (25 - 5) * 0.5)
    assert (other.steps_done, other.seconds_per_step, other.eta_seconds) == (3, None, None)
    assert (untouched.steps_done, untouched.seconds_per_step) == (0, None)
    store.succeed(first, PICTURE)
    done = store.job(first.job_id)
    assert (done.seconds_per_step, done.eta_seconds) == (0.5, None)


def test_a_beat_says_which_jobs_are_watched_and_how_until_the_wish_lapses(store: JobStore) -> None:
    first, second, third = claimed(store, 3)
    beat = {(claim.job_id, 1): Pace(1, 0.1) for claim in (first, second, third)}
    assert store.beat("w1@host", beat).previews == {}
    assert store.want_preview(first.job_id, vae=False)
    assert store.want_preview(second.job_id, vae=True)
    assert store.beat("w1@host", beat).previews == {first.job_id: False, second.job_id: True}
    assert store.want_preview(first.job_id, vae=True)
    assert store.want_preview(second.job_id, vae=True, seconds=-1)
    assert store.beat("w1@host", beat).previews == {first.job_id: True}


def test_a_wish_to_watch_waits_for_a_job_and_is_refused_by_one_that_ended(store: JobStore) -> None:
    batch = store.submit("batch", "me", 50, some(1))
    assert store.want_preview(f"{batch}-1", vae=True)
    claim = store.claim(store.enqueue(1)[0].job_id, "w1@host")
    assert claim is not None
    assert store.beat("w1@host", {(claim.job_id, 1): Pace(0, None)}).previews == {claim.job_id: True}
    store.succeed(claim, PICTURE)
    assert not store.want_preview(claim.job_id, vae=True)
    assert not store.want_preview("nobody-1", vae=True)


def test_queued_jobs_go_back_to_the_backlog_when_their_messages_are_gone(store: JobStore) -> None:
    store.submit("batch", "me", 50, some(3))
    ids = [bell.job_id for bell in store.enqueue(3)]
    assert sorted(store.queued("tiny")) == sorted(ids)
    assert store.unqueue(ids[1:]) == 2
    assert store.unqueue(ids[1:]) == 0
    assert [bell.job_id for bell in store.enqueue(3)] == ids[1:]


def test_a_worker_that_starts_again_gives_back_what_it_had_left(store: JobStore) -> None:
    store.introduce(WORKER)
    mine, other = claimed(store, 2)
    with_other = store.hand_back(other) and store.claim(store.enqueue(1)[0].job_id, "w2@host")
    assert with_other
    store.introduce(WORKER)
    assert state(store, mine) is JobState.PENDING
    assert state(store, other) is JobState.RUNNING


def test_workers_are_known_while_they_beat(store: JobStore, database: Database) -> None:
    store.introduce(WORKER)
    (known,) = store.workers()
    assert known.alive
    assert known.models == WORKER.models
    with database.write() as session:
        session.execute(sa.text("UPDATE workers SET seen_at = '2000-01-01 00:00:00.000000'"))
    assert not store.workers()[0].alive
    store.beat("w1@host", {})
    assert store.workers()[0].alive
    store.leave("w1@host")
    assert store.workers() == []


def test_a_batch_is_found_by_id_or_as_the_newest_of_its_name(store: JobStore) -> None:
    first = store.submit("sea", "me", 50, some(1))
    second = store.submit("sea", "me", 50, some(1))
    assert store.batch("sea").id == second
    assert store.batch(first).id == first
    assert [status.id for status in store.batches()] == [second, first]
    with pytest.raises(NotFound):
        store.batch("land")
    with pytest.raises(NotFound):
        store.job("land-1")


def test_prompts_are_only_data(store: JobStore) -> None:
    nasty = "'; DROP TABLE jobs; -- \\ \" %s {} \u2028 🎨 ￿"
    batch = store.submit(nasty[:200], "me", 50, [RenderSpec(prompt=nasty)])
    assert store.jobs(batch)[0].spec.prompt == nasty
    assert store.batch(batch).name == nasty


def test_every_move_the_store_makes_is_a_transition_that_the_states_allow() -> None:
    assert {state for state in JobState if state.terminal} == {
        JobState.SUCCEEDED,
        JobState.FAILED,
        JobState.CANCELLED,
    }
    assert all(following in JobState for states in TRANSITIONS.values() for following in states)
    assert {state for state in JobState if state.terminal and TRANSITIONS[state]} == {JobState.FAILED}

"""Every outcome of a job on a worker: real SQL, the gated engine, an object store in memory."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from farm.errors import BadRequest, DatabaseUnavailable, ErrorClass, ModelUnavailable
from farm.jobs.states import JobState, Outcome
from farm.specs.object_keys import checkpoint_key, preview_key
from tests.gated import SOON, Gated, fail, in_thread
from tests.unit.workers.service.conftest import ELSEWHERE, Jobs, MemoryStorage, UnsteadyDatabase
from workers.render.request import RenderRequest
from workers.service import render_job as module
from workers.service.outcomes import (
    Cancelled,
    Failed,
    HandedBack,
    LostLease,
    NothingToClaim,
    RenderOutcome,
    Succeeded,
)
from workers.service.render_job import render_job
from workers.service.worker import Worker


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the end of an outage."""
    monkeypatch.setattr(module, "OUTAGE_SECONDS", -1)
    monkeypatch.setattr(module, "CLAIM_SECONDS", -1)


def begun(worker: Worker, gated: Gated, job_id: str) -> Future[RenderOutcome]:
    """Render a job in a thread; returns once its first forward has begun."""
    outcome = in_thread(lambda: render_job(worker, job_id))
    assert gated.begun() == [job_id]
    return outcome


def counted(worker: Worker, outcome: Outcome) -> float | None:
    labels = {"model": "tiny", "outcome": outcome.value}
    return worker.metrics._registry.get_sample_value("farm_worker_jobs_total", labels)


def recorded(jobs: Jobs, job_id: str) -> list[tuple[Outcome, str | None]]:
    return [(attempt.outcome, attempt.reason) for attempt in jobs.store.queries.attempts(job_id)]


def stored(worker: Worker) -> dict[str, bytes]:
    assert isinstance(worker.storage, MemoryStorage)
    return worker.storage.objects


def test_a_finished_picture_is_stored_recorded_and_counted(worker: Worker, gated: Gated, jobs: Jobs) -> None:
    gated.allow()
    job_id = jobs.queued()
    outcome = render_job(worker, job_id)
    info = jobs.store.queries.job(job_id)
    assert info.state is JobState.SUCCEEDED
    assert outcome == Succeeded(f"s3://farm/{info.picture.key}")
    assert list(stored(worker)) == [info.picture.key]
    assert info.picture.dtype == "float32"
    assert counted(worker, Outcome.SUCCEEDED) == 1
    with worker.leases.renders() as renders:
        assert renders == {}


def test_a_trajectory_is_stored_beside_its_picture(worker: Worker, gated: Gated, jobs: Jobs) -> None:
    gated.allow()
    job_id = jobs.queued(trajectory=True)
    assert isinstance(render_job(worker, job_id), Succeeded)
    assert sorted(key.rpartition(".")[2] for key in stored(worker)) == ["png", "png", "webp"]


def test_a_job_that_another_worker_has_claimed_is_left_alone(worker: Worker, jobs: Jobs) -> None:
    job_id = jobs.queued()
    jobs.store.leases.claim(job_id, ELSEWHERE)
    assert render_job(worker, job_id) == NothingToClaim()


def test_a_job_stays_queued_when_sql_is_away_for_its_claim(
    worker: Worker, jobs: Jobs, database: UnsteadyDatabase
) -> None:
    job_id = jobs.queued()
    database.away = True
    assert render_job(worker, job_id) == NothingToClaim()
    assert jobs.state(job_id) is JobState.QUEUED


def test_a_claim_waits_for_sql_to_come_back(
    worker: Worker, gated: Gated, jobs: Jobs, database: UnsteadyDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLAIM_SECONDS", 60)
    gated.allow()
    job_id = jobs.queued()
    calls: list[str] = []
    claim = worker.leases.claim

    def away_once(job_id: str) -> Any:
        calls.append(job_id)
        if len(calls) == 1:
            raise DatabaseUnavailable("away")
        return claim(job_id)

    monkeypatch.setattr(worker.leases, "claim", away_once)
    assert isinstance(render_job(worker, job_id), Succeeded)


def test_a_worker_that_drains_puts_a_job_back_unclaimed(worker: Worker, jobs: Jobs) -> None:
    job_id = jobs.queued()
    worker.draining.set()
    assert render_job(worker, job_id) == NothingToClaim()
    assert (jobs.state(job_id), jobs.store.queries.job(job_id).attempt) == (JobState.PENDING, 0)


def test_a_worker_whose_engine_is_broken_puts_a_job_back_unclaimed(worker: Worker, jobs: Jobs) -> None:
    job_id = jobs.queued()
    worker.engine.failed = RuntimeError("the device is lost")
    assert render_job(worker, job_id) == NothingToClaim()
    assert (jobs.state(job_id), jobs.store.queries.job(job_id).attempt) == (JobState.PENDING, 0)


def test_a_job_that_is_too_large_is_handed_back_for_another_worker(worker: Worker, gated: Gated, jobs: Jobs) -> None:
    job_id, large = jobs.queued(), jobs.queued(width=512, height=512)
    worker.models.forbid(jobs.store.queries.job(large).spec)
    outcome = render_job(worker, large)
    assert outcome == HandedBack("no memory for it here", Outcome.HANDED_BACK)
    assert jobs.store.queries.job(large).avoid_worker == worker.name
    gated.allow()
    assert isinstance(render_job(worker, job_id), Succeeded)


def test_a_cancelled_render_is_stopped_and_recorded(worker: Worker, gated: Gated, jobs: Jobs) -> None:
    job_id = jobs.queued()
    outcome = begun(worker, gated, job_id)
    jobs.store.steering.cancel(job_id=job_id)
    worker.leases.renew()
    gated.allow()
    assert outcome.result(SOON) == Cancelled(Outcome.CANCELLED)
    assert (jobs.state(job_id), recorded(jobs, job_id)) == (JobState.CANCELLED, [(Outcome.CANCELLED, None)])
    assert counted(worker, Outcome.CANCELLED) == 1


def test_a_cancel_that_sql_has_recorded_for_a_lost_lease_is_not_recorded_twice(
    worker: Worker, gated: Gated, jobs: Jobs
) -> None:
    job_id = jobs.queued()
    outcome = begun(worker, gated, job_id)
    jobs.store.steering.cancel(job_id=job_id)
    worker.leases.renew()
    jobs.lease_runs_out(job_id)
    gated.allow()
    assert outcome.result(SOON) == Cancelled(Outcome.LOST)
    assert (jobs.state(job_id), len(recorded(jobs, job_id))) == (JobState.CANCELLED, 1)


def test_a_paused_render_is_handed_back(worker: Worker, gated: Gated, jobs: Jobs) -> None:
    job_id = jobs.queued()
    outcome = begun(worker, gated, job_id)
    jobs.store.steering.pause(job_id=job_id)
    worker.leases.renew()
    gated.allow()
    assert outcome.result(SOON) == HandedBack("paused", Outcome.HANDED_BACK)
    assert recorded(jobs, job_id) == [(Outcome.HANDED_BACK, "paused")]


def test_a_render_whose_lease_is_lost_is_given_up_and_records_nothing(worker: Worker, gated: Gated, jobs: Jobs) -> None:
    job_id = jobs.queued()
    outcome = begun(worker, gated, job_id)
    jobs.taken_by_another_worker(job_id)
    worker.leases.renew()
    gated.allow()
    assert outcome.result(SOON) == LostLease()
    assert (jobs.store.queries.job(job_id).worker, stored(worker)) == (ELSEWHERE, {})
    assert counted(worker, Outcome.LOST) == 1


def test_a_picture_that_comes_too_late_is_deleted_again(worker: Worker, gated: Gated, jobs: Jobs) -> None:
    job_id = jobs.queued()
    outcome = begun(worker, gated, job_id)
    jobs.taken_by_another_worker(job_id)
    gated.allow()
    assert outcome.result(SOON) == LostLease()
    assert (jobs.state(job_id), stored(worker)) == (JobState.RUNNING, {})


def test_a_render_that_is_handed_back_is_resumed_from_its_checkpoint(
    worker: Worker, gated: Gated, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = jobs.queued(num_inference_steps=100)
    outcome = begun(worker, gated, job_id)
    gated.next()
    worker.engine.hand_back(job_id, "its worker drains")
    gated.allow()
    assert outcome.result(SOON) == HandedBack("its worker stops", Outcome.HANDED_BACK)
    (key,) = stored(worker)
    assert key.endswith("a1.checkpoint.safetensors")

    resumed: list[RenderRequest] = []
    submit = worker.engine.submit
    monkeypatch.setattr(worker.engine, "submit", lambda request: resumed.append(request) or submit(request))
    jobs.store.backlog.enqueue(10)
    assert isinstance(render_job(worker, job_id), Succeeded)
    assert resumed[0].resume is not None
    assert resumed[0].resume.steps_done >= 1
    assert list(stored(worker)) == [jobs.store.queries.job(job_id).picture.key]  # the checkpoint is deleted


def test_a_drain_hands_back_what_does_not_finish_in_time_and_claims_no_more(
    worker: Worker, gated: Gated, jobs: Jobs
) -> None:
    worker.settings = worker.settings.model_copy(update={"drain_seconds": 0.0})
    job_id = jobs.queued(num_inference_steps=100)
    outcome = begun(worker, gated, job_id)
    gated.next()
    draining = in_thread(worker.drain)
    assert outcome.result(SOON) == HandedBack("its worker stops", Outcome.HANDED_BACK)
    gated.allow()
    draining.result(SOON)
    other = jobs.queued()
    assert render_job(worker, other) == NothingToClaim()
    assert jobs.state(other) is JobState.PENDING


def test_a_job_whose_model_was_on_its_way_when_the_worker_drained_is_handed_back(
    worker: Worker, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(_: object) -> None:
        worker.draining.set()
        raise ModelUnavailable("this worker stops, and fetches no more")

    monkeypatch.setattr(worker.engine, "submit", submit)
    job_id = jobs.queued()
    assert render_job(worker, job_id) == HandedBack("its worker stops", Outcome.HANDED_BACK)
    assert jobs.store.queries.job(job_id).tries == 0


@pytest.mark.parametrize(
    ("error", "error_class", "ended", "state"),
    [
        (BadRequest("no such sampler"), ErrorClass.BAD_INPUT, Outcome.FAILED, JobState.FAILED),
        (ModelUnavailable("the hub is away"), ErrorClass.TRANSIENT, Outcome.RETRIED, JobState.PENDING),
        (RuntimeError("a bug"), ErrorClass.TRANSIENT, Outcome.RETRIED, JobState.PENDING),
    ],
)
def test_an_error_fails_the_attempt_by_its_class(
    worker: Worker,
    jobs: Jobs,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    error_class: ErrorClass,
    ended: Outcome,
    state: JobState,
) -> None:
    monkeypatch.setattr(worker.engine, "submit", fail(error))
    job_id = jobs.queued()
    assert render_job(worker, job_id) == Failed(error, ended, error_class)
    assert (jobs.state(job_id), counted(worker, ended)) == (state, 1)
    ((_, reason),) = recorded(jobs, job_id)
    assert reason == ("RuntimeError: a bug" if isinstance(error, RuntimeError) else str(error))


def test_where_there_was_no_memory_the_size_is_published(worker: Worker, gated: Gated, jobs: Jobs) -> None:
    gated.most_rows = 0
    gated.allow()
    job_id = jobs.queued(width=512, height=512)
    outcome = render_job(worker, job_id)
    assert isinstance(outcome, Failed)
    assert (outcome.recorded, outcome.error_class) == (Outcome.RETRIED, ErrorClass.OUT_OF_MEMORY)
    spec = jobs.store.queries.job(job_id).spec
    assert not worker.models.allows(spec)
    (published,) = jobs.store.workers.all()
    assert published.models == worker.models.info.models


def test_an_error_of_a_claim_that_is_void_is_not_recorded(
    worker: Worker, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = jobs.queued()

    def submit(_: object) -> None:
        jobs.taken_by_another_worker(job_id)
        raise BadRequest("no such sampler")

    monkeypatch.setattr(worker.engine, "submit", submit)
    outcome = render_job(worker, job_id)
    assert isinstance(outcome, Failed)
    assert (outcome.recorded, jobs.state(job_id)) == (Outcome.LOST, JobState.RUNNING)


@pytest.mark.parametrize("end", ["success", "error", "hand back"])
def test_what_sql_can_not_record_is_an_error_of_the_task_and_the_lease_is_released(
    worker: Worker, gated: Gated, jobs: Jobs, database: UnsteadyDatabase, end: str
) -> None:
    worker.settings = worker.settings.model_copy(update={"drain_seconds": -4.0})
    job_id = jobs.queued(num_inference_steps=100 if end == "hand back" else 4)
    outcome = begun(worker, gated, job_id)
    database.away = True
    if end == "error":
        gated.faults["denoise"] = fail(RuntimeError("a bug"))
    if end == "hand back":
        worker.engine.hand_back(job_id, "it is paused")
    gated.allow()
    ended = outcome.result(SOON)
    assert isinstance(ended, Failed)
    assert isinstance(ended.error, DatabaseUnavailable)
    assert (ended.recorded, ended.error_class) == (Outcome.LOST, None)
    assert worker.leases._leases == {}
    assert jobs.state(job_id) is JobState.RUNNING  # until its lease expires


def test_a_checkpoint_that_can_not_be_read_starts_the_render_from_its_first_step(
    worker: Worker, gated: Gated, jobs: Jobs
) -> None:
    job_id = jobs.queued()
    claim = jobs.store.leases.claim(job_id, ELSEWHERE)
    key = checkpoint_key(claim.batch_id, claim.index, claim.attempt)
    stored(worker)[key] = b"no checkpoint"
    jobs.store.attempts.record_checkpoint(claim, key)
    jobs.store.attempts.hand_back(claim)
    jobs.store.backlog.enqueue(10)
    gated.allow()
    assert isinstance(render_job(worker, job_id), Succeeded)
    assert len(gated.forwards) == 4
    assert list(stored(worker)) == [jobs.store.queries.job(job_id).picture.key]


def test_leftovers_that_can_not_be_deleted_are_left_to_the_sweep(
    worker: Worker, gated: Gated, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = jobs.queued()
    outcome = begun(worker, gated, job_id)
    worker.observer.observe({job_id: False})
    gated.next()
    claim = worker.leases._leases[job_id].claim
    key = preview_key(claim.batch_id, claim.index, claim.attempt)
    while key not in stored(worker):
        pass
    done: list[str] = []
    left_behind = worker.store.attempts.report_leftovers
    attempts = worker.store.attempts
    monkeypatch.setattr(attempts, "report_leftovers", lambda claim: done.append(claim.job_id) or left_behind(claim))
    monkeypatch.setattr(worker.storage, "delete_many", fail(module.ServiceUnavailable("away")))
    gated.allow()
    assert isinstance(outcome.result(SOON), Succeeded)
    assert done == [job_id]


def test_nothing_more_is_written_once_the_picture_is_recorded(
    worker: Worker, gated: Gated, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write after the dispatcher's sweep would leave the object behind if the worker died then."""
    done: list[str] = []

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: done.append(name) or call(*given)

    monkeypatch.setattr(worker.storage, "put", noted("put", worker.storage.put))
    monkeypatch.setattr(worker.observer, "close", noted("close", worker.observer.close))
    monkeypatch.setattr(worker, "record_success", noted("record", worker.record_success))
    gated.allow()
    assert isinstance(render_job(worker, jobs.queued()), Succeeded)
    assert done[:3] == ["put", "close", "record"]
    assert "put" not in done[3:]

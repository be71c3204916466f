"""A worker built from its settings, from start to end."""

from collections.abc import Iterator

import pytest
import torch

from farm.errors import ModelError
from farm.jobs.states import JobState
from farm.settings import Settings
from tests.integration.conftest import wait_until
from tests.unit.workers.service.conftest import HERE, Jobs
from workers.service.render_job import render_job
from workers.service.worker import build_worker


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Restore the number of threads: a worker leaves all OpenMP threads to its engine."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_worker_registers_renews_its_leases_and_says_goodbye(settings: Settings, jobs: Jobs) -> None:
    settings = settings.model_copy(update={"beat_seconds": 0.05, "models": "tiny=null:?seconds_per_step=0.01"})
    worker = build_worker(settings, HERE)
    worker.start()
    assert [(found.name, found.alive, found.held) for found in jobs.store.workers.all()] == [(HERE, True, ("tiny",))]
    job_id = jobs.queued()
    lease = worker.leases.claim(job_id)
    assert lease is not None
    before = lease.renewed_at
    wait_until(lambda: lease.renewed_at > before, "its lease is renewed")
    worker.leases.release(lease)
    worker.drain()
    render_job(worker, jobs.queued())
    worker.stop()
    assert jobs.store.workers.all() == []
    assert jobs.state(job_id) is JobState.RUNNING


def test_a_worker_takes_back_the_jobs_that_its_predecessor_of_the_same_name_left(
    settings: Settings, jobs: Jobs
) -> None:
    job_id = jobs.queued()
    jobs.store.leases.claim(job_id, HERE)
    worker = build_worker(settings, HERE)
    worker.start()
    worker.stop()
    assert jobs.state(job_id) is JobState.PENDING


def test_a_worker_without_any_model_closes_what_it_opened(settings: Settings) -> None:
    settings = settings.model_copy(update={"models": "null:?no_such_number=1"})
    with pytest.raises(ModelError, match="null:"):
        build_worker(settings, HERE)  # an open database would raise a ResourceWarning, which fails the test

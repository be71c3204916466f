"""The metrics of a worker, with its real engine and without a metrics server."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import generate_latest

from farm.errors import ErrorClass
from farm.jobs.records import Claim, Picture, WorkerInfo
from farm.jobs.states import Outcome
from farm.settings import Settings
from farm.specs.spec import RenderSpec
from tests.contract import interfaces
from workers.engine.engine import Engine
from workers.models.pins import Pins
from workers.pipelines.null import NullPipeline
from workers.render.device import memory
from workers.render.request import RenderRequest
from workers.service.metrics import WorkerMetrics

Value = Callable[..., float | None]


@pytest.fixture
def metrics() -> Iterator[WorkerMetrics]:
    metrics = WorkerMetrics(Settings(database_url="sqlite://", broker_url="", s3_bucket=""))
    pins = Pins.of({"tiny": metrics.counted("tiny", NullPipeline(seconds_per_step=0.01))})
    engine = Engine(pins, slots=4)
    engine.start()
    metrics.engine = engine
    info = WorkerInfo("w1@host", "cpu", "float32", 4, "1")
    metrics.listen()
    metrics.start(info, torch.device("cpu"), engine, pins, {"sql": SimpleNamespace(outages=2)})
    yield metrics
    metrics.stop()
    engine.stop()


def value(metrics: WorkerMetrics, name: str, **labels: str) -> float | None:
    return metrics._registry.get_sample_value(f"farm_{name}", labels)


def claim(model: str = "tiny", attempt: int = 1, **more: object) -> Claim:
    spec = RenderSpec(prompt="x", seed=1, model=model, num_inference_steps=4)
    return Claim("b-1", attempt, spec, "b", "b", 1, 1, 50, None, waited_seconds=7.0, **more)


def ended(metrics: WorkerMetrics, outcome: Outcome, model: str = "tiny", error: ErrorClass | None = None) -> None:
    metrics.ended(claim(model), outcome, error)


def scraped(metrics: WorkerMetrics) -> dict[str, float]:
    return {
        f"{sample.name}{sorted(sample.labels.values())}": sample.value
        for family in metrics._registry.collect()
        for sample in family.samples
        if sample.name.startswith("farm_")
    }


def test_a_workers_metrics_have_the_names_and_labels_of_the_previous_release(metrics: WorkerMetrics) -> None:
    found = interfaces.metrics(generate_latest(metrics._registry).decode())
    assert list(interfaces.changes(interfaces.RECORDED["metrics"]["worker"], found, "metrics")) == []


def test_without_a_port_no_url_is_published(metrics: WorkerMetrics) -> None:
    assert metrics.url is None


def test_what_becomes_of_attempts_is_counted_by_model_and_outcome(metrics: WorkerMetrics) -> None:
    for outcome in Outcome:
        assert value(metrics, "worker_jobs_total", model="tiny", outcome=outcome.value) == 0
    ended(metrics, Outcome.SUCCEEDED)
    ended(metrics, Outcome.RETRIED, error=ErrorClass.TRANSIENT)
    ended(metrics, Outcome.LOST)
    assert value(metrics, "worker_jobs_total", model="tiny", outcome="succeeded") == 1
    assert value(metrics, "worker_jobs_total", model="tiny", outcome="lost") == 1
    assert value(metrics, "worker_errors_total", error_class="transient") == 1


def test_a_name_that_somebody_made_up_makes_no_series_of_its_own(metrics: WorkerMetrics) -> None:
    for number in range(100):
        ended(metrics, Outcome.FAILED, f"made-up-{number}")
    assert value(metrics, "worker_jobs_total", model="other", outcome="failed") == 100
    assert len([name for name in scraped(metrics) if "made-up" in name]) == 0


def test_the_wait_of_a_job_is_counted_once(metrics: WorkerMetrics) -> None:
    metrics.claimed(claim())
    metrics.claimed(claim(attempt=2))
    assert value(metrics, "worker_wait_seconds_count", model="tiny") == 1
    assert value(metrics, "worker_wait_seconds_sum", model="tiny") == 7


def test_steps_of_a_render_that_went_on_from_a_checkpoint_are_not_timed(metrics: WorkerMetrics) -> None:
    picture = Picture("k", "a" * 64, 1, 8, 8, "b" * 64, render_seconds=2.0, device_seconds=1.5)
    metrics.rendered(claim(), picture)
    resumed = Claim(**{**vars(claim(attempt=2)), "checkpoint_key": "x"})
    metrics.rendered(resumed, picture)
    assert value(metrics, "worker_render_seconds_count", model="tiny") == 2
    assert value(metrics, "worker_step_seconds_count", model="tiny") == 1
    assert value(metrics, "worker_step_seconds_sum", model="tiny") == 0.5
    assert value(metrics, "worker_device_seconds_total", model="tiny") == 3.0


def test_forwards_are_counted_by_their_rows_and_slots_as_they_are_taken(metrics: WorkerMetrics) -> None:
    engine: Engine = metrics.engine
    specs = [RenderSpec(prompt="x", seed=n, model="tiny", num_inference_steps=50) for n in range(6)]
    futures = [engine.submit(RenderRequest(f"b-{n}", spec)) for n, spec in enumerate(specs)]
    seen = 0.0
    while seen < 4:
        seen = max(seen, value(metrics, "worker_slots_in_use") or 0)
        assert not all(future.done() for future in futures)
    assert value(metrics, "worker_waiting_requests") == 2
    for future in futures:
        future.result(30)
    assert (value(metrics, "worker_slots"), value(metrics, "worker_slots_in_use")) == (4, 0)
    assert value(metrics, "worker_forward_rows_sum", model="tiny") == 6 * 50


def test_services_memory_and_models_are_read_when_asked(metrics: WorkerMetrics) -> None:
    found = scraped(metrics)
    assert found["farm_worker_service_errors_total['sql']"] == 2
    assert found["farm_worker_model_loads_total[]"] == 1
    assert found["farm_worker_info['1', 'cpu', 'float32']"] == 1
    used, total = found["farm_worker_device_memory_used_bytes[]"], found["farm_worker_device_memory_total_bytes[]"]
    assert 10_000_000 < used < total
    assert memory(torch.device("meta")) is not None  # without a GPU, the memory of the process

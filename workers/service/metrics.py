"""The Prometheus metrics of a worker: counters of its jobs, and values read from engine and models at each scrape."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from farm.errors import ErrorClass
from farm.jobs.records import Claim, Picture, WorkerInfo
from farm.jobs.states import Outcome
from farm.runtime.metrics_server import MetricsServer, Service
from farm.settings import Settings
from workers.engine.engine import Engine
from workers.models.pins import Pins
from workers.pipelines.texts import Embeddings
from workers.render.device import memory
from workers.render.pipeline import Pipeline
from workers.render.request import RenderRequest

log = logging.getLogger(__name__)

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
_STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25)
_WAIT_SECONDS = (0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class WorkerMetrics:
    """The metrics of a worker, counted even if no port is set: a few microseconds per forward.

    Labels are models and outcomes, never a batch, an owner or a job, whose number is unbounded.
    """

    def __init__(self, settings: Settings) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series each
        self._settings = settings
        self._registry = registry = CollectorRegistry()
        self._server: MetricsServer | None = None
        self._models: tuple[str, ...] = ()

        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(f"farm_{name}", documentation, labels, registry=registry)

        def histogram(name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"farm_worker_{name}", documentation, ["model"], buckets=buckets, registry=registry)

        self._jobs = counter("worker_jobs", "Attempts that ended here, by what became of them.", "model", "outcome")
        self._errors = counter("worker_errors", "Attempts that an error ended, by what it needs.", "error_class")
        self._device_seconds = counter("worker_device_seconds", "What finished renders took the device.", "model")
        self._lost_leases = counter("lost_leases", "Jobs that were given up for an earlier worker of this name.")
        self._hits = counter("worker_embedding_cache_hits", "Texts whose embeddings were kept.", "model")
        self._misses = counter("worker_embedding_cache_misses", "Texts that were encoded.", "model")
        self._waits = histogram("wait_seconds", "From a batch's submission to a job's first claim.", _WAIT_SECONDS)
        self._renders = histogram("render_seconds", "From a slot to the last pixel.", _SECONDS)
        self._steps = histogram("step_seconds", "What a render took for each of its steps.", _STEP_SECONDS)
        self._forwards = histogram("forward_rows", "Rows that share a forward.", _ROWS)

    # --- the server

    def listen(self) -> None:
        """Bind the port, if set. Raises `NotConfigured` if it is taken."""
        if self._settings.metrics_port is not None:
            self._server = MetricsServer(self._settings, self._registry)

    @property
    def url(self) -> str | None:
        """The address for Prometheus; None if no port is set."""
        return self._server.url if self._server else None

    def start(
        self, info: WorkerInfo, device: torch.device, engine: Engine, pins: Pins, services: Mapping[str, Service]
    ) -> None:
        """Start serving the metrics, with those of these parts."""
        self._models = pins.names
        for model in pins.names:  # Prometheus sees an increase only after a sample of 0
            for outcome in Outcome:
                self._jobs.labels(model, outcome.value)
            for metric in (self._device_seconds, self._hits, self._misses, self._waits, self._renders, self._steps):
                metric.labels(model)
        for error_class in ErrorClass:
            self._errors.labels(error_class.value)
        self._registry.register(WorkerCollector(info, device, engine, pins, services))
        ProcessCollector(registry=self._registry)
        if self._server is not None:
            self._server.start()
            log.info("metrics at %s", self._server.url)

    def stop(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.close()
            self._server = None

    # --- counting

    def counted(self, model: str, pipeline: Pipeline) -> Pipeline:
        """A pipeline whose forwards and texts are counted."""
        return cast(
            "Pipeline",
            _Counted(pipeline, self._forwards.labels(model), self._hits.labels(model), self._misses.labels(model)),
        )

    def lost(self, jobs: int) -> None:
        """Count the jobs that an earlier worker of this name lost."""
        self._lost_leases.inc(jobs)

    def claimed(self, claim: Claim) -> None:
        """Count a started attempt."""
        if claim.attempt == 1:
            self._waits.labels(self._model(claim)).observe(claim.waited_seconds)

    def rendered(self, claim: Claim, picture: Picture) -> None:
        """Count a recorded picture."""
        model = self._model(claim)
        self._renders.labels(model).observe(picture.render_seconds)
        self._device_seconds.labels(model).inc(picture.device_seconds or 0.0)
        if not claim.checkpoint_key:  # else an earlier attempt did some of the steps
            self._steps.labels(model).observe(picture.render_seconds / claim.spec.num_inference_steps)

    def ended(self, claim: Claim, recorded: Outcome, error_class: ErrorClass | None) -> None:
        """Count an ended attempt, by its outcome in SQL and the class of its error."""
        self._jobs.labels(self._model(claim), recorded.value).inc()
        if error_class is not None:
            self._errors.labels(error_class.value).inc()

    def _model(self, claim: Claim) -> str:
        # Only a message in a wrong queue brings a job of a model that is not served here.
        return claim.spec.model if claim.spec.model in self._models else "other"


class _Counted:
    """A pipeline that counts its forwards and texts; all other attributes are the wrapped pipeline's."""

    def __init__(self, pipeline: Pipeline, forwards: Histogram, hits: Counter, misses: Counter) -> None:
        self._pipeline = pipeline
        self._forwards, self._hits, self._misses = forwards, hits, misses

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def denoise(self, requests: Sequence[RenderRequest], rows: int | None = None) -> torch.Tensor:
        """Called once per forward."""
        self._forwards.observe(sum(request.rows for request in requests))
        return self._pipeline.denoise(requests, rows)

    def encode(self, request: RenderRequest) -> None:
        """Called once per request, by one thread: a change of the cache's counters is due to this request."""
        cache: Embeddings | None = getattr(self._pipeline, "embeddings", None)
        hits, misses = (cache.hits, cache.misses) if cache else (0, 0)
        self._pipeline.encode(request)
        if cache:
            self._hits.inc(cache.hits - hits)
            self._misses.inc(cache.misses - misses)


class WorkerCollector(Collector):
    """The metrics that are read from engine, models and device at each scrape."""

    def __init__(
        self, info: WorkerInfo, device: torch.device, engine: Engine, pins: Pins, services: Mapping[str, Service]
    ) -> None:
        self._info = info
        self._device = device
        self._engine = engine
        self._pins = pins
        self._services = services

    def collect(self) -> Iterator[Metric]:
        """Called at each scrape; does not wait for a step."""
        about = GaugeMetricFamily("farm_worker_info", "What the worker is.", labels=["device", "dtype", "version"])
        about.add_metric([self._info.device, self._info.dtype, self._info.version], 1)
        yield about
        seen = self._engine.progress().values()
        slots = self._engine.slots
        denoising = sum(one.seconds is not None and one.steps_done < one.steps_total for one in seen)
        yield GaugeMetricFamily("farm_worker_slots", "Requests that may run at once.", value=slots)
        yield GaugeMetricFamily("farm_worker_slots_in_use", "Requests that run.", value=min(slots, denoising))
        waiting = sum(one.seconds is None for one in seen)
        yield GaugeMetricFamily("farm_worker_waiting_requests", "Claimed jobs without a slot yet.", value=waiting)
        if found := memory(self._device):
            for name, value in zip(("used", "total"), found, strict=True):
                shown = f"Memory of the device, {name}; on the CPU the process' part of the machine's."
                yield GaugeMetricFamily(f"farm_worker_device_memory_{name}_bytes", shown, value=value)
        held = GaugeMetricFamily("farm_worker_model_bytes", "Parameters of the models held.", labels=["model"])
        for model, nbytes in self._pins.memory_used.items():
            held.add_metric([model], nbytes)
        yield held
        refused = len(self._pins.failures)
        yield GaugeMetricFamily("farm_worker_refused_models", "Models that can't be loaded.", value=refused)
        yield CounterMetricFamily("farm_worker_model_loads", "Models loaded.", value=self._pins.loads)
        yield CounterMetricFamily("farm_worker_model_evictions", "Models that made room.", value=self._pins.evictions)
        errors = CounterMetricFamily(
            "farm_worker_service_errors", "Times that a service did not answer.", labels=["service"]
        )
        for name, service in self._services.items():
            errors.add_metric([name], service.outages)
        yield errors

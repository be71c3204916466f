"""A dispatcher's metrics for Prometheus: the farm's numbers from SQL, the dispatcher's own, and the worker targets.

Every dispatcher serves all of them, leading or not, so that no number is lost with the leader. The farm's numbers are
the same from each dispatcher: queries take their `max`. A dispatcher's own numbers add up.
"""

import http
import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from farm.dispatch.dispatcher import Dispatcher
from farm.errors import ServiceUnavailable
from farm.jobs.database import Database
from farm.jobs.demand import Demands, demands
from farm.jobs.leadership import Leadership
from farm.jobs.states import JobState
from farm.jobs.workers import Workers
from farm.runtime.metrics_server import MetricsServer, Service, respond
from farm.settings import Settings

log = logging.getLogger(__name__)

_FRESH_SECONDS = 4.0
"""How long a database result is reused, so that more scrapes cause no more queries."""
_PATIENCE_SECONDS = 3.0
"""How long a scrape waits for the database. Prometheus gives it ten seconds by default."""


class FarmCollector(Collector):
    """The farm's numbers from SQL; omitted if the database is slow, so that every scrape gets a response."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._lease_seconds = settings.lease_seconds
        self._one_at_a_time = ThreadPoolExecutor(1, thread_name_prefix="metrics-sql")
        self._lock = threading.Lock()
        self._asked: Future[Demands] | None = None
        self._asked_at = 0.0

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; called with every scrape."""
        found = self._answer()
        yield GaugeMetricFamily("farm_sql_up", "Whether the database answered in time.", value=found is not None)
        if found is None:
            return
        yield GaugeMetricFamily("farm_workers", "Live workers.", value=found.workers)
        jobs = GaugeMetricFamily("farm_jobs", "Jobs of all batches, by state.", labels=["state"])
        for state, count in found.jobs.items():
            jobs.add_metric([state.value], count)
        yield jobs
        yield from _by_model(found)

    def _answer(self) -> Demands | None:
        with self._lock:
            due = time.monotonic() - self._asked_at >= _FRESH_SECONDS
            if self._asked is None or (due and self._asked.done()):
                self._asked = self._one_at_a_time.submit(demands, self._db, self._lease_seconds)
                self._asked_at = time.monotonic()
            asked = self._asked
        try:
            return asked.result(_PATIENCE_SECONDS)
        except (ServiceUnavailable, TimeoutError):
            return None


def _by_model(found: Demands) -> Iterator[Metric]:
    active = GaugeMetricFamily(
        "farm_active_jobs", "Jobs that have not ended, by state and model.", labels=["state", "model"]
    )
    gauges = {
        name: GaugeMetricFamily(f"farm_{name}", shown, labels=["model"])
        for name, shown in (
            ("held_up_jobs", "Waiting jobs of paused batches and paused owners."),
            ("queued_device_seconds", "Estimated device seconds of waiting jobs that are not paused."),
            ("running_device_seconds", "Estimated device seconds of running jobs, from first to last step."),
            (
                "oldest_wait_seconds",
                "Age of the oldest batch with unpaused waiting jobs; 0 without one.",
            ),
            ("model_workers", "Live workers that serve the model."),
            ("model_slots", "Slots of the live workers that serve the model."),
        )
    }
    for model, demand in found.models.items():
        for state in (JobState.PENDING, JobState.QUEUED, JobState.RUNNING):
            active.add_metric([state.value, model], demand.jobs[state])
        waited = 0.0 if demand.waits_since is None else (found.asked_at - demand.waits_since).total_seconds()
        for name, value in (
            ("held_up_jobs", demand.held_up),
            ("queued_device_seconds", demand.queued_seconds),
            ("running_device_seconds", demand.running_seconds),
            ("oldest_wait_seconds", max(0.0, waited)),
            ("model_workers", demand.workers),
            ("model_slots", demand.slots),
        ):
            gauges[name].add_metric([model], value)
    yield active
    yield from gauges.values()


class DispatcherCollector(Collector):
    """The counts of one dispatcher since it started."""

    def __init__(self, dispatcher: Dispatcher, leadership: Leadership, services: Mapping[str, Service]) -> None:
        self._dispatcher = dispatcher
        self._leadership = leadership
        self._services = services

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; called with every scrape."""
        tally = self._dispatcher.tally
        leads = self._leadership.leads
        yield GaugeMetricFamily("farm_dispatcher_leads", "Whether this dispatcher leads.", value=leads)
        for name, shown, value in (
            ("dispatch_passes", "Passes over the backlog.", tally.passes),
            ("dispatch_pass_seconds", "Seconds that passes took.", tally.pass_seconds),
            (
                "dispatched_jobs",
                "Jobs this dispatcher moved into Redis; clients move others.",
                tally.dispatched,
            ),
            ("lost_leases", "Jobs recovered from expired leases.", tally.lost_leases),
            ("lost_messages", "Jobs recovered because their message was missing from Redis.", tally.lost_messages),
        ):
            yield CounterMetricFamily(f"farm_{name}", shown, value=value)
        errors = CounterMetricFamily(
            "farm_dispatcher_service_errors", "Failed calls of the dispatcher to a service.", labels=["service"]
        )
        for name, service in self._services.items():
            errors.add_metric([name], service.outages)
        yield errors


@dataclass(frozen=True)
class WorkerTargets:
    """The live workers with metrics, as targets for Prometheus' `http_sd_configs`."""

    workers: Workers

    def __call__(self, _environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a refresh; after an error Prometheus keeps its current targets."""
        try:
            found = [target(one.name, one.metrics_url) for one in self.workers.all() if one.alive and one.metrics_url]
        except ServiceUnavailable as error:
            return respond(start_response, http.HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n")
        return respond(start_response, http.HTTPStatus.OK, json.dumps(found), "application/json")


def target(worker: str, url: str) -> dict[str, Any]:
    """A worker as a target for Prometheus."""
    where = urlsplit(url)
    return {
        "targets": [where.netloc],
        "labels": {"worker": worker, "__scheme__": where.scheme, "__metrics_path__": where.path},
    }


def serve(
    db: Database,
    workers: Workers,
    dispatcher: Dispatcher,
    leadership: Leadership,
    settings: Settings,
    services: Mapping[str, Service],
) -> MetricsServer | None:
    """Serve a dispatcher's metrics if a port is set. Raises `NotConfigured` if the port is taken."""
    if settings.metrics_port is None:
        return None
    registry = CollectorRegistry()
    with suppress(ValueError):  # it needs /proc
        ProcessCollector(registry=registry)
    registry.register(FarmCollector(db, settings))
    registry.register(DispatcherCollector(dispatcher, leadership, services))
    server = MetricsServer(settings, registry, {"/workers": WorkerTargets(workers)})
    server.start()
    log.info("metrics at %s", server.url)
    return server

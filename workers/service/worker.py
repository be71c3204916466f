"""One worker: its models and engine built from the settings, and everything around them until it stops."""

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from farm import __version__
from farm.errors import ServiceUnavailable
from farm.jobs.database import Database
from farm.jobs.records import Success, WorkerInfo
from farm.jobs.store import JobStore
from farm.jobs.workers import Workers
from farm.objects.storage import Storage
from farm.runtime.periodic import Periodic
from farm.settings import Settings
from workers.engine.engine import Engine
from workers.engine.forward_sizes import ForwardSizes
from workers.engine.warming import warm
from workers.models.opener import Opener
from workers.models.pins import Pins
from workers.models.served import Served
from workers.pipelines import load
from workers.render.device import choose_device, choose_dtype, keep_freed_memory, use_threads
from workers.render.pipeline import Pipeline
from workers.service.group_commit import GroupCommit
from workers.service.leases import HeldLeases
from workers.service.metrics import WorkerMetrics
from workers.service.observer import Observer
from workers.service.published_models import PublishedModels
from workers.service.watchdog import Watchdog

log = logging.getLogger(__name__)

_PUBLISH_SECONDS = 10.0
"""How often the loaded models and the device's memory are compared with what SQL has."""


class Worker:
    """The parts of one worker process around an engine that runs."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        *,
        db: Database,
        storage: Storage,
        pins: Pins,
        engine: Engine,
        models: PublishedModels,
        metrics: WorkerMetrics,
        draining: threading.Event,
    ) -> None:
        self.name = name
        self.settings = settings
        self.storage = storage
        self.pins = pins
        self.engine = engine
        self.models = models
        self.metrics = metrics
        self.draining = draining
        """Set once the worker claims no more jobs."""
        self.store = JobStore.over(db, settings)
        self.observer = Observer(engine, storage, self.store.attempts, settings)
        self.leases = HeldLeases(
            self.store.leases,
            name,
            settings,
            progress=engine.progress,
            cancel=engine.cancel,
            hand_back=engine.hand_back,
            previews=self.observer.observe,
        )
        self.record_success = GroupCommit(self._record_successes, "ends")
        """Records the picture of a claim; False if the claim no longer holds."""
        self._db = db
        watchdog = Watchdog(engine, settings.stuck_seconds, draining)
        self._periodic = (
            Periodic("watchdog", settings.beat_seconds, watchdog.check),
            Periodic("models", _PUBLISH_SECONDS, models.publish),
        )

    def start(self) -> None:
        """Register the worker in SQL, and renew its leases from now on."""
        self.store.workers.register(self.models.info)
        self.metrics.lost(self.store.leases.reclaim(self.name))
        self.leases.start()
        for each in self._periodic:
            each.start()

    def drain(self) -> None:
        """Claim no more, finish what can be finished in `drain_seconds`, checkpoint and hand back the rest."""
        if not self.draining.is_set():
            self.draining.set()
            log.info("draining, %.0f s at most", self.settings.drain_seconds)
            self.engine.drain(self.settings.drain_seconds)

    def stop(self) -> None:
        """Stop every thread, remove the worker from SQL, and close all connections."""
        self.leases.stop()
        for each in self._periodic:
            each.stop(self.settings.beat_seconds)
        self.engine.stop()
        self.observer.stop()
        try:
            self.store.workers.deregister(self.name)
        except ServiceUnavailable as error:
            log.warning("can't remove the worker from SQL: %s", error)
        self.metrics.stop()
        self.storage.close()
        self._db.close()
        log.info("stopped")

    def _record_successes(self, ended: Sequence[Success]) -> list[bool]:
        recorded = self.store.attempts.succeed_many(ended)
        return [success.claim.job_id in recorded for success in ended]


def build_worker(settings: Settings, name: str) -> Worker:
    """Load and warm the models. Raises `ModelError` if none can be loaded, or one can't render."""
    with ExitStack() as undo:
        db = Database(settings.database_url)
        undo.callback(db.close)
        db.check_schema()
        storage = Storage(settings)
        undo.callback(storage.close)
        metrics = WorkerMetrics(settings)
        metrics.listen()  # before anything takes long: its port may be taken
        undo.callback(metrics.stop)
        draining = threading.Event()
        # The loop takes all threads of OpenMP. With a second pool of them, as each Python thread that uses torch makes
        # one, both would sleep between operators, and a small model would take three times as long.
        threads = torch.get_num_threads()
        use_threads(1)
        keep_freed_memory()
        device = choose_device(settings.device)
        dtype = choose_dtype(settings.dtype, device)
        opener = Opener(settings, storage, load, device, dtype, draining)

        def open_model(name: str, source: str) -> Pipeline:
            return metrics.counted(name, opener.open(name, source))

        pins = Pins(opener.sources, open_model, settings.memory_budget, size=opener.weights_bytes)
        pins.load_all()
        engine = Engine(
            pins,
            slots=settings.slots,
            line=4 * settings.slots,
            sizes=ForwardSizes(settings.forward_sizes, slots=settings.slots),
            deterministic=settings.deterministic,
            threads=threads,
        )
        engine.start()
        began = time.monotonic()
        warm(engine, pins)
        log.info("warmed models=%s device=%s in %.1f s", ",".join(pins.held), device, time.monotonic() - began)
        info = WorkerInfo(
            name=name,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            slots=engine.slots,
            version=__version__,
            metrics_url=metrics.url,
        )
        models = PublishedModels(Workers(db, settings), info, Served(pins, opener, device))
        metrics.start(models.info, device, engine, pins, {"sql": db, "s3": storage})
        undo.pop_all()
        return Worker(
            name,
            settings,
            db=db,
            storage=storage,
            pins=pins,
            engine=engine,
            models=models,
            metrics=metrics,
            draining=draining,
        )

"""A worker's life around its engine: build and warm, renew the leases, drain and stop."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from farm import __version__
from farm.errors import ServiceUnavailable
from farm.jobs.database import Database
from farm.jobs.records import Claim, Pace, Picture, WorkerInfo
from farm.jobs.states import Outcome
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.settings import Settings
from farm.specs.spec import RenderSpec
from workers.engine.engine import Engine
from workers.engine.forward_sizes import ForwardSizes
from workers.engine.warming import warm
from workers.models.opener import Opener
from workers.models.pins import Pins
from workers.models.served import Served
from workers.pipelines import load
from workers.render.device import choose_device, choose_dtype, keep_freed_memory, use_threads
from workers.render.pipeline import Pipeline
from workers.render.request import Progress
from workers.service.group_commit import Gathered
from workers.service.metrics import WorkerMetrics
from workers.service.observer import Held, Observer

log = logging.getLogger(__name__)

_REFRESH_SECONDS = 10.0
"""How often the models loaded now and the device's memory are written to the database."""


class Worker:
    """Everything one worker process holds: its models in an engine, and leases on the jobs in there."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.settings = settings
        self.name = name
        self.db = Database(settings.database_url)
        self.store = JobStore(self.db, settings)
        self.storage = Storage(settings)
        self.draining = threading.Event()
        self.metrics = WorkerMetrics(settings)
        self._stopped = threading.Event()
        self._held: dict[str, Held] = {}
        self._lock = threading.Lock()
        self._claims = Gathered(self._claim_all, "claims")
        self._ends = Gathered(self._succeed_all, "ends")
        self._heart = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
        self._guard = threading.Thread(target=self._guard_leases, name="leases", daemon=True)

    def build(self) -> None:
        """Load and warm the models. Raises `ModelError` if none can be had, or one can't render."""
        self.db.check_schema()
        self.metrics.listen()  # before anything takes long: its port may be taken
        # All of them are for the loop: with a second pool of OpenMP threads, as each thread that uses torch makes one,
        # the threads of both would sleep between operators, and a small model take three times as long.
        threads = torch.get_num_threads()
        use_threads(1)
        keep_freed_memory()
        self.device = device = choose_device(self.settings.device)
        dtype = choose_dtype(self.settings.dtype, device)
        settings = self.settings
        opener = Opener(settings, self.storage, load, device, dtype, self.draining)

        def open_model(name: str, source: str) -> Pipeline:
            return self.metrics.counted(name, opener.open(name, source))

        self.pins = Pins(opener.sources, open_model, settings.memory_budget, size=opener.weights_bytes)
        self.pins.load_all()
        self.engine = Engine(
            self.pins,
            slots=settings.slots,
            line=4 * settings.slots,
            sizes=ForwardSizes(settings.forward_sizes, most_rows=2 * settings.slots),
            deterministic=settings.deterministic,
            threads=threads,
        )
        self.engine.start()
        began = time.monotonic()
        warm(self.engine, self.pins)
        held = ",".join(self.pins.held)
        log.info("warmed models=%s device=%s in %.1f s", held, device, time.monotonic() - began)
        self.observer = Observer(self.engine, self.storage, self.store, settings)
        self._served = Served(self.pins, opener, device)
        self.info = WorkerInfo(
            name=self.name,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            slots=self.engine.slots,
            version=__version__,
            models=self._served.models,
            memory=self._served.memory,
            metrics_url=self.metrics.url,
        )
        self.metrics.start(self.info, device, self.engine, self.pins, {"sql": self.db, "s3": self.storage})

    def live(self) -> None:
        """Make the worker known and begin to renew leases."""
        self.metrics.lost(self.store.introduce(self.info))
        self._heart.start()
        self._guard.start()

    def has_room(self, spec: RenderSpec) -> bool:
        """Whether there may be memory here for a picture of that size."""
        return self._served.allows(spec)

    def no_room(self, spec: RenderSpec) -> None:
        """Take no more pictures of that size, and record that there is no memory for them here."""
        self._served.forbid(spec)
        self._describe()

    # --- leases ---------------------------------------------------------------------------------------------

    def claim(self, job_id: str) -> Held | None:
        """Claim a job and keep its lease renewed until `release`; None if it is not to be had."""
        asked = time.monotonic()
        claim = self._claims(job_id)
        if claim is None:
            return None
        held = Held(claim, renewed=asked)
        if time.monotonic() - asked > self.settings.beat_seconds:
            self._beat([held])  # the database hung, and the lease may be much younger than the question
        with self._lock:
            self._held[job_id] = held
        self.metrics.claimed(claim)
        return held

    def release(self, held: Held) -> None:
        """Renew this job's lease no more: what became of it is recorded, or it is lost."""
        self.metrics.ended(held)
        with self._lock:
            if self._held.get(held.claim.job_id) is held:
                del self._held[held.claim.job_id]

    @contextmanager
    def renders(self) -> Iterator[Mapping[tuple[str, int], Progress]]:
        """How far each render here is, by job id and attempt; meanwhile none of these jobs is released."""
        progress = self.engine.progress()
        with self._lock:
            yield {
                (job_id, held.claim.attempt): progress[job_id]
                for job_id, held in self._held.items()
                if job_id in progress
            }

    def succeed(self, held: Held, picture: Picture) -> bool:
        """Record a job's picture; False if the claim no longer holds."""
        recorded = self._ends((held.claim, picture))
        held.outcome = Outcome.SUCCEEDED if recorded else Outcome.LOST
        if recorded:
            self.metrics.rendered(held.claim, picture)
        return recorded

    def _claim_all(self, job_ids: Sequence[str]) -> list[Claim | None]:
        claims = self.store.claim_many(set(job_ids), self.name)
        return [claims.pop(job_id, None) for job_id in job_ids]  # of two messages for one job, one claims it

    def _succeed_all(self, ended: Sequence[tuple[Claim, Picture]]) -> list[bool]:
        recorded = self.store.succeed_many(ended)
        return [claim.job_id in recorded for claim, _ in ended]

    def _beat_on(self) -> None:
        refreshed = -_REFRESH_SECONDS
        began, pause = time.monotonic(), self.settings.beat_seconds
        # From one beginning to the next: over a slow network a beat takes long itself.
        while not self._stopped.wait(max(began + pause - time.monotonic(), pause / 4)):
            began = time.monotonic()
            with self._lock:
                mine = list(self._held.values())
            try:
                self._beat(mine)
                if time.monotonic() - refreshed > _REFRESH_SECONDS:
                    self._served.refresh()
                    self._describe()
                    refreshed = time.monotonic()
            except ServiceUnavailable as error:
                log.error("can't renew leases: %s", error)
            except Exception:
                log.exception("heartbeat failed")
            if self.engine.failed is not None and not self.draining.is_set():
                log.critical("the engine is broken, this worker ends and must be replaced: %s", self.engine.failed)
                os.kill(os.getpid(), signal.SIGTERM)  # its jobs have failed as retryable; a supervisor starts anew
                return
            if self.engine.busy_seconds > self.settings.stuck_seconds:
                # Nothing frees a thread that a device does not come back to. The leases run out, and a job that
                # hangs every worker it meets is set aside for that.
                log.critical("a forward hangs for %.0f s: this worker ends", self.engine.busy_seconds)
                os._exit(os.EX_SOFTWARE)

    def _describe(self) -> None:
        """Record the models served and the device's memory, if they differ from what was recorded last."""
        info = replace(self.info, models=self._served.models, memory=self._served.memory)
        if info != self.info:
            self.store.describe(info)
            self.info = info

    def _guard_leases(self) -> None:
        """Stop every render whose lease is about to run out: whoever holds the clock may give its job away then.

        In a thread of its own, since a database can be away without a word, and hold up the beat for long.
        """
        seconds = self.settings.lease_seconds - self.settings.beat_seconds
        while not self._stopped.wait(self.settings.beat_seconds / 4):
            with self._lock:
                mine = list(self._held.values())
            for held in mine:
                if time.monotonic() - held.renewed > seconds:
                    if not held.lost.is_set():
                        log.error("lease not renewed, stopping job_id=%s", held.claim.job_id)
                    self._stop_render(held, held.lost)

    def _beat(self, mine: list[Held]) -> None:
        """Renew these leases and stop what is to be stopped."""
        asked = time.monotonic()
        progress = self.engine.progress()
        paces = {}
        for held in mine:
            if seen := progress.get(held.claim.job_id):  # else it is not there yet, or has left
                held.pace = Pace(seen.steps_done, seen.seconds_per_step)
            paces[held.claim.job_id, held.claim.attempt] = held.pace
        beat = self.store.beat(self.name, paces)
        for held in mine:
            if held.claim.job_id not in beat.lost:
                held.renewed = asked
            if held.claim.job_id in beat.cancelled:
                self._stop_render(held, held.cancelled)
            elif held.claim.job_id in beat.lost:
                self._stop_render(held, held.lost)
            elif held.claim.job_id in beat.paused:
                held.paused.set()
                # On every beat anew, as with a cancel. Who is denoised already gets its picture.
                self.engine.hand_back(held.claim.job_id, "it is paused")
        self.observer.beat(mine, beat.previews)

    def _stop_render(self, held: Held, why: threading.Event) -> None:
        with self._lock:
            if self._held.get(held.claim.job_id) is not held:
                return  # it ended while the beat was on its way
        why.set()
        # On every beat anew: a job between its claim and its place in the engine's line is not known there yet.
        self.engine.cancel(held.claim.job_id)

    # --- the end --------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Claim no more, finish what can be finished in `drain_seconds`, write down and hand back the rest."""
        if not self.draining.is_set():
            self.draining.set()
            log.info("draining, %.0f s at most", self.settings.drain_seconds)
            self.engine.drain(self.settings.drain_seconds)

    def stop(self) -> None:
        """End the heartbeat and the engine, and say goodbye."""
        self._stopped.set()
        if self._heart.is_alive():
            self._heart.join(self.settings.beat_seconds + 5)
        self.engine.stop()
        self.observer.close()
        try:
            self.store.leave(self.name)
        except ServiceUnavailable as error:
            log.warning("could not say goodbye: %s", error)
        self.metrics.stop()
        self.storage.close()
        self.db.close()
        log.info("stopped")

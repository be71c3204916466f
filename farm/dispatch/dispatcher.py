"""The dispatcher: moves jobs from the backlog in SQL to the window in Redis, and recovers lost ones."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from farm.dispatch.batch_rows import BatchRows
from farm.dispatch.copier import Copier
from farm.dispatch.fill import fill
from farm.dispatch.retention import Retention
from farm.errors import DatabaseUnavailable, ServiceUnavailable
from farm.jobs.leadership import RENEW_SECONDS, Leadership
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.queue.broker import Broker
from farm.settings import Settings

log = logging.getLogger(__name__)

BUSY_SECONDS, IDLE_SECONDS = 0.1, 0.5
"""The pause between two passes: while jobs move, and while none do."""
_OUTAGE_SECONDS = 1.0
"""The pause after a pass that failed because a service was unavailable."""
_SWEEP_SECONDS, _SWEEP_OUTAGE_SECONDS = 5.0, 60.0
"""The pause between two sweeps of the object store, and after a failed sweep."""
_SWEEP_CHUNK = 1000


@dataclass
class Tally:
    """The counts of a dispatcher since it started."""

    passes: int = 0
    pass_seconds: float = 0.0
    dispatched: int = 0
    """Jobs moved into Redis."""
    lost_leases: int = 0
    lost_messages: int = 0


class Dispatcher:
    """Keeps a window of jobs in Redis, in serving order.

    Any number may run at once, as processes and inside clients: each pass holds a lock. Among the processes, only the
    leader works.
    """

    def __init__(
        self,
        store: JobStore,
        broker: Broker,
        storage: Storage,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._broker = broker
        self._storage = storage
        self._clock = clock
        self._copier = Copier(store.reuse, storage, clock)
        self._retention = Retention(store, storage, settings)
        self._batch_rows = BatchRows(store.overview, settings)
        self._window = settings.window
        self._beat_seconds = settings.beat_seconds
        self._lease_seconds = settings.lease_seconds
        self._grace_seconds = settings.lease_seconds / 2
        self._missed_since: dict[str, float] = {}
        self.tally = Tally()

    def fill(self) -> int:
        """Move jobs from the backlog into Redis until the window of each model is full; returns the number of jobs.

        Raises `BrokerUnavailable` after it has returned the unpublished jobs to the backlog.
        """
        backlog, workers = self._store.backlog, self._store.workers
        found = fill(backlog, workers, self._broker, self._window, copy=self._copier.ready)
        self._copier.offer(found.copies)
        return len(found.queued)

    def recover(self) -> int:
        """Return to the backlog jobs with an expired lease and queued jobs with a lost message; returns the number.

        A message counts as lost after half a lease time outside Redis: until then it may be in publication, or with a
        worker that is about to claim the job. A lost message that reappears later has nothing to claim.
        """
        lost = self._store.leases.expire()
        self.tally.lost_leases += lost
        now, missed = self._clock(), {}
        for model in self._store.backlog.queued_models():
            for job_id in set(self._store.backlog.queued(model)) - self._broker.waiting(model):
                missed[job_id] = self._missed_since.get(job_id, now)
        gone = [job_id for job_id, since in missed.items() if now - since >= self._grace_seconds]
        self._missed_since = {job_id: since for job_id, since in missed.items() if job_id not in gone}
        if gone:
            log.warning("messages gone, jobs brought back: %s", ", ".join(gone[:20]))
            back = self._store.backlog.unqueue(gone)
            self.tally.lost_messages += back
            lost += back
        return lost

    def sweep(self, settled_seconds: float = 0.0) -> int:
        """Delete leftovers of ended jobs from the object store, and aborted submissions from SQL.

        Returns the number of jobs. Jobs that ended less than `settled_seconds` ago are skipped, because the last write
        of a killed worker may still arrive. Objects are deleted before their SQL rows, so the next sweep repairs a
        failure in between. Raises `StorageUnavailable`.
        """
        for batch_id in self._store.submissions.abandoned():
            log.warning("batch_id=%s was never submitted to its end, deleted", batch_id)
            self._store.submissions.discard(batch_id)
        swept = 0
        while stale := self._store.leftovers.find(_SWEEP_CHUNK, settled_seconds):
            self._storage.delete_many(key for _, keys in stale for key in keys)
            self._store.leftovers.swept([job_id for job_id, _ in stale])
            swept += len(stale)
        return swept

    def run(self, stop: threading.Event, leadership: Leadership) -> None:
        """Fill, and recover twice a beat, while this process leads, until `stop` is set.

        Logs an outage once and waits for its end. Sweeping, copying and the batch rows for Flower have their own
        threads, so that neither a hanging object store nor a slow event reader delays a job.
        """
        threading.Thread(target=self._sweep_on, args=(stop, leadership), name="sweep", daemon=True).start()
        threading.Thread(target=self._batch_rows.run, args=(stop, leadership), name="batch rows", daemon=True).start()
        self._copier.start(stop)
        log.info("dispatching, window %d", self._window)
        recover_seconds = self._beat_seconds / 2
        since_recovery, away = recover_seconds, ""
        # Workers can't renew their leases while the database is down. After an outage they get a lease time to renew
        # before any lease expires: finished work is not rendered again.
        after_outage = recover_seconds - self._lease_seconds
        while not stop.is_set():
            began = self._clock()
            try:
                # In this thread, so that a process that hangs in a pass loses leadership.
                if not leadership.keep():
                    stop.wait(RENEW_SECONDS)
                    continue
                if away:
                    self._broker.ping()  # cheaper than moving a window of jobs back and forth every second
                moved = self.fill()
                self.tally.passes += 1
                self.tally.pass_seconds += self._clock() - began
                self.tally.dispatched += moved
                if self._clock() - began > self._grace_seconds:  # the database hung
                    since_recovery = after_outage
                if since_recovery >= recover_seconds:
                    since_recovery = 0.0
                    moved += self.recover()
                if away:
                    log.info("back again, dispatching")
                pause, away = BUSY_SECONDS if moved else IDLE_SECONDS, ""
            except ServiceUnavailable as error:
                if type(error).__name__ != away:
                    log.error("%s; trying again every second", error)
                pause, away = _OUTAGE_SECONDS, type(error).__name__
                if isinstance(error, DatabaseUnavailable):
                    since_recovery = after_outage
            since_recovery += pause
            stop.wait(pause)
        with suppress(ServiceUnavailable):
            leadership.resign()
        log.info("dispatcher stopped")

    def _sweep_on(self, stop: threading.Event, leadership: Leadership) -> None:
        pause = 0.0
        while not stop.wait(pause):
            pause = _SWEEP_SECONDS
            if leadership.leads:
                # Separate, so that a failing sweep does not block manifests and deletions.
                swept = _tried(lambda: self.sweep(2 * self._lease_seconds))
                more = _tried(lambda: self._retention.turn(stop))
                if swept is None or more is None:
                    pause = _SWEEP_OUTAGE_SECONDS
                elif more:
                    pause = 0.0


def _tried(turn: Callable[[], int]) -> int | None:
    """The result of a turn; logs a failure and returns None."""
    try:
        return turn()
    except ServiceUnavailable as error:
        log.warning("can't sweep, trying again in %.0f s: %s", _SWEEP_OUTAGE_SECONDS, error)
    except Exception:  # the thread must survive: no other thread ends, deletes or sweeps batches
        log.exception("can't sweep, trying again in %.0f s", _SWEEP_OUTAGE_SECONDS)
    return None

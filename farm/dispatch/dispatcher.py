"""The dispatcher: from the backlog in SQL to the window in Redis, and back again what was lost."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from farm.dispatch.batch_rows import BatchRows
from farm.dispatch.copier import Copier
from farm.dispatch.retention import Retention
from farm.errors import BrokerUnavailable, DatabaseUnavailable, ServiceUnavailable
from farm.jobs.leadership import RENEW_SECONDS, Leadership
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.queue.broker import Broker
from farm.settings import Settings

log = logging.getLogger(__name__)

BUSY_SECONDS, IDLE_SECONDS = 0.1, 0.5
"""How often a standing dispatcher looks: while it finds jobs to move, and while it finds none."""
_OUTAGE_SECONDS = 1.0
_SWEEP_SECONDS, _SWEEP_OUTAGE_SECONDS = 5.0, 60.0
"""How often it looks for what can be swept out of the object store, and how soon again when that is away."""
_SWEEP_CHUNK = 1000


@dataclass
class Tally:
    """What a dispatcher has done since it began."""

    passes: int = 0
    pass_seconds: float = 0.0
    dispatched: int = 0
    """Jobs it has moved into Redis."""
    lost_leases: int = 0
    lost_messages: int = 0


class Dispatcher:
    """Keeps a window of jobs in Redis, in the order the farm wants them served.

    Any number may run at once, standing or inline in producers: each pass moves jobs under one lock. Of those that
    stand only one acts.
    """

    def __init__(self, store: JobStore, broker: Broker, storage: Storage, settings: Settings) -> None:
        self._store = store
        self._broker = broker
        self._storage = storage
        self._copier = Copier(store.reuse, storage)
        self._retention = Retention(store, storage, settings)
        self._batch_rows = BatchRows(store.overview, settings)
        self._window = settings.window
        self._beat_seconds = settings.beat_seconds
        self._lease_seconds = settings.lease_seconds
        self._grace_seconds = settings.lease_seconds / 2
        self._missed_since: dict[str, float] = {}
        self.tally = Tally()

    def fill(self) -> int:
        """Move jobs from the backlog into Redis until each model has what its live workers need; returns how many.

        Raises `BrokerUnavailable`, with everything that could not be published back in the backlog.
        """
        # Committed first, published second: a worker that is quicker than the commit would find nothing to claim.
        # Should this process die between the two, `recover` finds jobs without a message.
        copies: dict[str, str] = {}
        bells = self._store.backlog.enqueue(
            self._window, slots=self._store.workers.slots(), copies=copies if self._copier.ready else None
        )
        self._copier.offer(copies)
        if bells:
            try:
                self._broker.publish(bells)
            except BrokerUnavailable:
                self._store.backlog.unqueue([bell.job_id for bell in bells])
                raise
        return len(bells)

    def recover(self) -> int:
        """Bring back what was lost: jobs of workers whose lease ran out, queued jobs whose message is gone.

        A message is gone when it was not in Redis for half a lease time: one may be on its way in, or in the hands
        of a worker that is about to claim. A message that turns up after all finds nothing to claim.
        """
        lost = self._store.leases.expire()
        self.tally.lost_leases += lost
        now, missed = time.monotonic(), {}
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
        """Delete what jobs that have ended left in the object store beside their pictures; returns of how many.

        Only of those that ended so long ago at least: what a worker was still writing may come after it is killed. And
        from SQL what submissions that were broken off have left. Deleted first, forgotten second: what fails between is
        only done again. Raises `StorageUnavailable`.
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
        """Fill, and recover twice a beat, while it leads, until `stop` is set; an outage is logged once and waited out.

        It sweeps, copies, and tells Flower of the batches beside that, in threads of their own: neither an object store
        that hangs nor whoever listens to events holds up a job.
        """
        threading.Thread(target=self._sweep_on, args=(stop, leadership), name="sweep", daemon=True).start()
        threading.Thread(target=self._batch_rows.run, args=(stop, leadership), name="batch rows", daemon=True).start()
        self._copier.start(stop)
        log.info("dispatching, window %d", self._window)
        recover_seconds = self._beat_seconds / 2
        since_recovery, away = recover_seconds, ""
        # While the database is away, workers can't renew their leases. They get the time to, before any job is taken
        # from them: what they have finished meanwhile is not rendered again.
        after_outage = recover_seconds - self._lease_seconds
        while not stop.is_set():
            began = time.monotonic()
            try:
                # Here and not in a thread of its own: who hangs in a pass leads no longer.
                if not leadership.keep():
                    stop.wait(RENEW_SECONDS)
                    continue
                if away:
                    self._broker.ping()  # rather than move a window of jobs there and back every second
                moved = self.fill()
                self.tally.passes += 1
                self.tally.pass_seconds += time.monotonic() - began
                self.tally.dispatched += moved
                if time.monotonic() - began > self._grace_seconds:  # the database hung, and has come back
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
                # Each by itself: what can't be swept keeps no batch from its end.
                swept = _tried(lambda: self.sweep(2 * self._lease_seconds))
                more = _tried(lambda: self._retention.turn(stop))
                if swept is None or more is None:
                    pause = _SWEEP_OUTAGE_SECONDS
                elif more:
                    pause = 0.0


def _tried(turn: Callable[[], int]) -> int | None:
    """What it returns; None, and a line in the log, if it can't do its work now."""
    try:
        return turn()
    except ServiceUnavailable as error:
        log.warning("can't sweep, trying again in %.0f s: %s", _SWEEP_OUTAGE_SECONDS, error)
    except Exception:  # without its thread no batch would end, go or be swept, and dispatching would go on
        log.exception("can't sweep, trying again in %.0f s", _SWEEP_OUTAGE_SECONDS)
    return None

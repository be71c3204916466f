"""The dispatcher: from the backlog in SQL to the window in Redis, and back again what was lost."""

import logging
import threading

from farm.broker import Broker
from farm.errors import BrokerUnavailable, ServiceUnavailable
from farm.jobs import JobStore

log = logging.getLogger(__name__)

BUSY_SECONDS, IDLE_SECONDS = 0.1, 0.5
"""How often a standing dispatcher looks: while it finds jobs to move, and while it finds none."""
_OUTAGE_SECONDS = 1.0


class Dispatcher:
    """Keeps a window of jobs in Redis, in the order the farm wants them served.

    Any number may run at once, standing or inline in producers: each pass moves jobs under one lock.
    """

    def __init__(self, store: JobStore, broker: Broker, window: int) -> None:
        self._store = store
        self._broker = broker
        self._window = window

    def fill(self) -> int:
        """Move jobs from the backlog into Redis until the window is full; returns how many.

        Raises `BrokerUnavailable`, with everything that could not be published back in the backlog.
        """
        # Committed first, published second: a worker that is quicker than the commit would find nothing to claim.
        # Should this process die between the two, `recover` finds jobs without a message.
        bells = self._store.enqueue(self._window)
        if bells:
            try:
                self._broker.publish(bells)
            except BrokerUnavailable:
                self._store.unqueue([bell.job_id for bell in bells])
                raise
        return len(bells)

    def recover(self) -> int:
        """Bring back what was lost: jobs of workers whose lease ran out, queued jobs whose message is gone."""
        count = self._store.expire_leases()
        for model in self._store.queued_models():
            count += self._store.unqueue_lost(model, self._broker.waiting(model))
        return count

    def run(self, stop: threading.Event, recover_seconds: float) -> None:
        """Fill and recover until `stop` is set; an outage is logged once and waited out."""
        log.info("dispatching, window %d", self._window)
        since_recovery, away = recover_seconds, ""
        while not stop.is_set():
            try:
                moved = self.fill()
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
            since_recovery += pause
            stop.wait(pause)
        log.info("dispatcher stopped")

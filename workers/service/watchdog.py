"""Ends a worker whose engine is broken or hangs; its supervisor then starts another."""

import logging
import os
import signal
import threading

from workers.engine.engine import Engine

log = logging.getLogger(__name__)


class Watchdog:
    """Ends this process when its engine can no longer render; `check` is called with every heartbeat."""

    def __init__(self, engine: Engine, stuck_seconds: float, draining: threading.Event) -> None:
        self._engine, self._stuck_seconds, self._draining = engine, stuck_seconds, draining
        self._stopping = False

    def check(self) -> None:
        """Drain a worker with a broken engine by SIGTERM, and end one with a hung engine at once."""
        if self._engine.failed is not None and not self._stopping and not self._draining.is_set():
            log.critical("the engine is broken, this worker ends and must be replaced: %s", self._engine.failed)
            self._stopping = True
            os.kill(os.getpid(), signal.SIGTERM)  # its jobs have failed as retryable
        if self._engine.busy_seconds > self._stuck_seconds:
            # A thread that waits for a hung device can't be freed. The leases expire, and a job that hangs every
            # worker is set aside as failed after several attempts.
            log.critical("a forward hangs for %.0f s: this worker ends", self._engine.busy_seconds)
            os._exit(os.EX_SOFTWARE)

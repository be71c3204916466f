"""Repeats a call at a fixed rate in its own thread."""

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Periodic:
    """A daemon thread that makes a call every `seconds`, measured from start to start.

    A call that takes longer delays the next call, which starts a quarter of `seconds` after it. An exception is logged.
    """

    def __init__(
        self,
        name: str,
        seconds: float,
        call: Callable[[], object],
        *,
        clock: Callable[[], float] = time.monotonic,
        stopped: threading.Event | None = None,
    ) -> None:
        self._seconds = seconds
        self._call = call
        self._clock = clock
        self._stopped = stopped or threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Make the first call after `seconds`."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Make no further call, and wait at most `timeout` seconds for the current call."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        began = self._clock()
        while not self._stopped.wait(max(began + self._seconds - self._clock(), self._seconds / 4)):
            began = self._clock()
            try:
                self._call()
            except Exception:
                log.exception("%s failed", self._thread.name)

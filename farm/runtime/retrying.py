"""Repeats a call while a service is unavailable."""

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from farm.errors import ServiceUnavailable
from farm.runtime.backoff import Backoff

log = logging.getLogger(__name__)

T = TypeVar("T")

_BACKOFF = Backoff(base_seconds=0.5, max_seconds=5.0)


def insist(call: Callable[[], T], seconds: float, stop: threading.Event | None = None) -> T:
    """Make a call, and repeat it while it raises `ServiceUnavailable`; raises the error after `seconds`.

    `stop` ends a pause; the call is then made once more.
    """
    stop = stop or threading.Event()
    deadline, failures = time.monotonic() + seconds, 0
    while True:
        try:
            return call()
        except ServiceUnavailable as error:
            if time.monotonic() > deadline or stop.is_set():
                raise
            failures += 1
            pause = _BACKOFF.seconds(failures)
            log.warning("%s; trying again in %.1f s", error, pause)
            stop.wait(pause)

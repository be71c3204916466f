"""A call that is repeated while a service is away."""

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from farm.errors import ServiceUnavailable

log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 5.0


def insist(call: Callable[[], T], seconds: float, stop: threading.Event | None = None) -> T:
    """Make a call, and repeat it while it raises `ServiceUnavailable`; raises that after `seconds`.

    `stop` ends a pause: the call is then made once more.
    """
    stop = stop or threading.Event()
    deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE_SECONDS
    while True:
        try:
            return call()
        except ServiceUnavailable as error:
            if time.monotonic() > deadline or stop.is_set():
                raise
            log.warning("%s; trying again in %.1f s", error, pause)
            stop.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

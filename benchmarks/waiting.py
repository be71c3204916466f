"""Waits for a condition."""

import time
from collections.abc import Callable

_SECONDS = 300
_POLL_SECONDS = 0.01


def wait_until(true: Callable[[], bool]) -> None:
    """Return when a condition is true; raises `TimeoutError` after five minutes."""
    deadline = time.monotonic() + _SECONDS
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {_SECONDS} s in vain")
        time.sleep(_POLL_SECONDS)

"""Polls with growing pauses until a deadline."""

import time
from collections.abc import Iterator

_POLL_SECONDS = (0.1, 1.0)
"""The first pause and the longest one."""


def polls(timeout: float | None, late: str) -> Iterator[None]:
    """Yield whenever the caller should poll: immediately, then endlessly with growing pauses.

    Raises `TimeoutError(late)` after `timeout` seconds; None means no limit.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    pause, most = _POLL_SECONDS
    while True:
        yield
        left = pause if deadline is None else deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(late)
        time.sleep(min(pause, left))
        pause = min(pause * 1.2, most)

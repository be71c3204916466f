"""How a client waits for what others do: it asks ever more slowly, until a deadline."""

import time
from collections.abc import Iterator

_POLL_SECONDS = (0.1, 1.0)
"""How often it asks: at first, and in the end."""


def polls(timeout: float | None, late: str) -> Iterator[None]:
    """Each time at which to ask, the first now; without end.

    Raises `TimeoutError(late)` after `timeout` seconds; None waits for ever.
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

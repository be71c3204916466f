"""Turns stop signals into events."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_signals(stop: threading.Event, hurry: threading.Event | None = None) -> Iterator[None]:
    """Set `stop` on the first SIGINT, SIGTERM or SIGHUP, and `hurry`, if given, on any further signal."""
    # A handler interrupts the main thread, perhaps inside `stop.wait()`: if it set the event itself, it would deadlock
    # on the event's lock. `SimpleQueue.put` is reentrant.
    told: SimpleQueue[bool] = SimpleQueue()

    def handle(_number: int, _frame: FrameType | None) -> None:
        told.put(True)

    def pass_on() -> None:
        while told.get():
            (stop if hurry is None or not stop.is_set() else hurry).set()

    listener = threading.Thread(target=pass_on, name="stop signals", daemon=True)
    listener.start()
    # `nohup` ignores SIGHUP for its command: keep ignoring it.
    numbers = [number for number in _SIGNALS if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        told.put(False)
        listener.join()

"""The progress of a transfer: a bar on a terminal, or lines in the log."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_LINE_SECONDS = 10.0
_LINE_PARTS = 10


@contextmanager
def transfer_bar(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on standard error; yields a function that adds bytes and is thread-safe."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True, quiet=not shown)) as display:
        task = display.add_task(what, total=total)
        yield lambda count: display.advance(task, count)


@contextmanager
def transfer_lines(what: str, total: int, log: logging.Logger) -> Iterator[Callable[[int], None]]:
    """A log line per tenth, at most one per second, and at least every ten seconds."""
    lock = threading.Lock()
    began = told_at = time.monotonic()
    done = told = 0

    def line(now: float) -> None:
        nonlocal told, told_at
        told, told_at = done, now
        speed = done / max(now - began, 1e-3)
        log.info("%s: %d of %d MiB, %.0f MiB/s", what, done >> 20, total >> 20, speed / 2**20)

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            now = time.monotonic()
            waited = now - told_at
            if waited >= _LINE_SECONDS or (waited >= 1 and (done - told) * _LINE_PARTS >= total):
                line(now)

    yield advance


@contextmanager
def transfer(what: str, total: int, log: logging.Logger) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, log lines elsewhere."""
    with transfer_bar(what, total) if Console(stderr=True).is_terminal else transfer_lines(what, total, log) as advance:
        yield advance

"""Group commit: combines simultaneous calls of many threads into few."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from farm.errors import ServiceUnavailable

A = TypeVar("A")
R = TypeVar("R")

GATHER_SECONDS = 0.02
"""How long after a combined call the next one begins, at the earliest, so that more calls share it."""


class GroupCommit(Generic[A, R]):
    """A function of one argument for many threads: calls that arrive during a call share the next.

    `together` takes a list of arguments and returns their results in order. A call that finds none running starts at
    once. If a shared call raises, each argument is retried alone, unless a service is unreachable, so that the error
    reaches only the call that caused it.
    """

    def __init__(self, together: Callable[[Sequence[A]], Sequence[R]], name: str) -> None:
        self._together = together
        self._line: SimpleQueue[tuple[A, Future[R]]] = SimpleQueue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._next_at = 0.0

    def __call__(self, argument: A) -> R:
        """Call `together`, possibly with other threads' arguments, and wait for the result."""
        result: Future[R] = Future()
        self._line.put((argument, result))
        self._thread.submit(self._serve)
        return result.result()

    def _serve(self) -> None:
        if self._line.empty():
            return
        if (early := self._next_at - time.monotonic()) > 0:
            time.sleep(early)
        group = []
        try:
            while True:
                group.append(self._line.get_nowait())
        except Empty:
            self._call(group)
            self._next_at = time.monotonic() + GATHER_SECONDS

    def _call(self, group: Sequence[tuple[A, Future[R]]]) -> None:
        try:
            found = self._together([argument for argument, _ in group])
        except Exception as error:  # noqa: BLE001  (raised again in the calling threads)
            if len(group) == 1 or isinstance(error, ServiceUnavailable):
                for _, result in group:
                    result.set_exception(error)
            else:
                for each in group:
                    self._call([each])
            return
        for (_, result), value in zip(group, found, strict=True):
            result.set_result(value)

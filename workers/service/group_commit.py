"""Many calls that threads make at the same time, combined into few: group commit."""

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
    """A call of one argument that may be made by many threads: calls that arrive during one share the next one.

    `together` takes all their arguments, and returns their results in order. A call after a quiet time is made at
    once. If a shared call raises, each of its calls is made alone, unless a service is away; the error goes to the
    call that caused it.
    """

    def __init__(self, together: Callable[[Sequence[A]], Sequence[R]], name: str) -> None:
        self._together = together
        self._line: SimpleQueue[tuple[A, Future[R]]] = SimpleQueue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._next_at = 0.0

    def __call__(self, argument: A) -> R:
        """Make the call, together with others, and wait for its result."""
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

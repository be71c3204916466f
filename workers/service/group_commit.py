"""What many threads ask for at the same time, done at once."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from farm.errors import ServiceUnavailable

A = TypeVar("A")
R = TypeVar("R")

GATHER_SECONDS = 0.02
"""How soon after a call the next one begins, at the earliest: at full load a statement is worth several."""


class Gathered(Generic[A, R]):
    """Calls of many threads as few calls: whatever is asked while one is under way goes into the next one.

    `together` answers each of what it is given, in order. What is asked when nothing was asked just before is done at
    once: nobody waits for company that does not come. An error is for whoever's call it was; if it was one for several,
    each is called alone, unless a service is away.
    """

    def __init__(self, together: Callable[[Sequence[A]], Sequence[R]], name: str) -> None:
        self._together = together
        self._line: SimpleQueue[tuple[A, Future[R]]] = SimpleQueue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._next_at = 0.0

    def __call__(self, asked: A) -> R:
        """Ask, and wait for the answer."""
        answer: Future[R] = Future()
        self._line.put((asked, answer))
        self._thread.submit(self._serve)
        return answer.result()

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
            self._answer(group)
            self._next_at = time.monotonic() + GATHER_SECONDS

    def _answer(self, group: Sequence[tuple[A, Future[R]]]) -> None:
        try:
            answers = self._together([asked for asked, _ in group])
        except Exception as error:  # noqa: BLE001  (it is for whoever asked)
            if len(group) == 1 or isinstance(error, ServiceUnavailable):
                for _, answer in group:
                    answer.set_exception(error)
            else:
                for one in group:
                    self._answer([one])
            return
        for (_, answer), found in zip(group, answers, strict=True):
            answer.set_result(found)

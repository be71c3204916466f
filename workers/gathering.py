"""What many threads ask for at the same time, done at once."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from farm.errors import ServiceUnavailable

A = TypeVar("A")
R = TypeVar("R")


class Gathered(Generic[A, R]):
    """Calls of many threads as few calls: whatever is asked while one is under way goes into the next one.

    `together` answers each of what it is given, in order. What one asks alone is done alone, and at once: nobody waits
    for company. An error is for whoever's call it was; if it was one for several, each is called alone, unless a
    service is away.
    """

    def __init__(self, together: Callable[[Sequence[A]], Sequence[R]], name: str) -> None:
        self._together = together
        self._line: SimpleQueue[tuple[A, Future[R]]] = SimpleQueue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def __call__(self, asked: A) -> R:
        """Ask, and wait for the answer."""
        answer: Future[R] = Future()
        self._line.put((asked, answer))
        self._thread.submit(self._serve)
        return answer.result()

    def close(self) -> None:
        """End the thread when all is answered."""
        self._thread.shutdown(wait=False)

    def _serve(self) -> None:
        group = []
        try:
            while True:
                group.append(self._line.get_nowait())
        except Empty:
            if group:
                self._answer(group)

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

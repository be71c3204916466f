"""Many transfers at once, in bounded memory."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
V = TypeVar("V")

_THREADS = 8
_AHEAD = 2 * _THREADS


def parallel_map(function: Callable[[T], V], items: Iterable[T]) -> Generator[V]:
    """Yield `function` of each item in order, computed by eight threads at most sixteen items ahead of the caller.

    The first error is raised. A caller that stops early, or closes the generator, leaves no call running.
    """
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="parallel") as pool:
        pending: deque[Future[V]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) == _AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

"""Celery's thread pool, waking the event loop when a thread is free, and with threads for urgent tasks."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from celery.concurrency.thread import TaskPool as ThreadPool
from kombu.asynchronous import Hub


class TaskPool(ThreadPool):
    """A thread pool that tells the consumers at once when they may fetch again.

    With `worker_disable_prefetch` the consumer fetches only while a thread is free, but a finishing thread does not
    wake its event loop: each slot would idle for the rest of the loop's poll, about a second a task.

    `limit` is what the ordinary consumer may fill. `UrgentConsumer` may fill as many threads again, so that each is
    bounded by what it took itself; threads nobody needs are never started.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hub: Hub | None = None
        self.executor = ThreadPoolExecutor(max_workers=2 * self.limit)

    def register_with_event_loop(self, loop: Hub) -> None:
        """Keep Celery's event loop: after a lost connection it goes on, and is no longer kombu's current one."""
        self._hub = loop

    def on_apply(self, *args: Any, **kwargs: Any) -> Any:
        """Run a task in a thread, as Celery asks; called once a message."""
        applied = super().on_apply(*args, **kwargs)
        applied.f.add_done_callback(self._wake)
        return applied

    def _wake(self, _done: Future[Any]) -> None:
        if self._hub is not None:
            self._hub.call_soon(_nothing)


def _nothing() -> None:
    pass

"""Celery's thread pool with extra threads for urgent tasks; it wakes the event loop when a thread is free."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from celery.concurrency.thread import TaskPool as ThreadPool
from kombu.asynchronous import Hub


class TaskPool(ThreadPool):
    """A thread pool that lets the consumers fetch the next message as soon as a thread is free.

    With `worker_disable_prefetch` the consumer fetches only while a thread is free, but a finishing thread does not
    wake its event loop: each slot would idle for the rest of the loop's poll, about a second a task.

    The ordinary consumer may use `limit` threads and `UrgentConsumer` as many again, so that each is limited by its own
    tasks. A thread starts when it is first needed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hub: Hub | None = None
        self.executor = ThreadPoolExecutor(max_workers=2 * self.limit)

    def register_with_event_loop(self, loop: Hub) -> None:
        """Store Celery's event loop: after a lost connection it is no longer kombu's current loop."""
        self._hub = loop

    def on_apply(self, *args: Any, **kwargs: Any) -> Any:
        """Run a task in a thread; Celery calls it once per message."""
        applied = super().on_apply(*args, **kwargs)
        applied.f.add_done_callback(self._wake)
        return applied

    def _wake(self, _done: Future[Any]) -> None:
        if self._hub is not None:
            self._hub.call_soon(_nothing)


def _nothing() -> None:
    pass

"""What a worker tells Flower of its tasks, a few times a second."""

import time
from typing import Any

from celery import bootsteps
from celery.bootsteps import CLOSE  # type: ignore[attr-defined]

REPORT_SECONDS = 0.1
_AWAY_SECONDS = 2.0
"""What lies here for longer than this does because Redis is away."""


class Reporter(bootsteps.StartStopStep):
    """Celery's bootstep that sends task events together, and not each by itself.

    Celery gathers them until its loop is free, which between short tasks is at once: each event is then a message of
    its own.
    """

    requires = ("celery.worker.consumer.events:Events", "celery.worker.consumer.tasks:Tasks")

    def __init__(self, c: Any, **kwargs: Any) -> None:
        super().__init__(c, **kwargs)
        c.reporter = self
        self._events: Any = None
        self._due: float | None = None  # since when something waits for the loop

    def start(self, c: Any) -> None:
        """Called whenever Celery has connected to Redis: its dispatcher of events is a new one then."""
        if c.hub is None or c.event_dispatcher is None:
            return
        self._due = None

        def buffered() -> None:
            """Called by every thread that has an event."""
            if self._due is None:
                self._due = time.monotonic()
                c.hub.call_soon(c.hub.call_later, REPORT_SECONDS, report)

        def report() -> None:
            self._due = None
            if c.event_dispatcher is not None:
                c.event_dispatcher.flush()

        self._events = c.event_dispatcher
        self._events.on_send_buffered = buffered
        self._events.buffer_limit = 1024  # whoever has an event finds it full only where the loop stands still

    def stop(self, c: Any) -> None:
        """Called when Celery's loop ends, because it has lost Redis or because the worker stops.

        The tasks that end after a worker's loop send their events themselves: nobody else would.
        """
        if self._events is not None and c.blueprint.state == CLOSE:
            self._events.on_send_buffered = self._events.flush
            self._events.flush()

    @property
    def hears(self) -> bool:
        """Whether what is told leaves: not while Redis is away."""
        return self._events is not None and (self._due is None or time.monotonic() - self._due < _AWAY_SECONDS)

    def tell(self, kind: str, job_id: str, **fields: str) -> None:
        """Tell Flower something of a job, after all that its task has told so far and before all it tells later.

        Waits for nothing: Celery's loop sends it with the next events of tasks.
        """
        self._events.send(kind, uuid=job_id, **fields)

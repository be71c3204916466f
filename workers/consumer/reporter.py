"""Sends the task events of a worker in batches, a few times a second."""

import time
from typing import Any

from celery import bootsteps
from celery.bootsteps import CLOSE  # type: ignore[attr-defined]

REPORT_SECONDS = 0.1
_AWAY_SECONDS = 2.0
"""An event that waits for longer than this does so because Redis is away."""


class Reporter(bootsteps.StartStopStep):
    """Celery's bootstep that sends many task events in one message.

    Celery buffers events until its loop is free, which is at once between short tasks: each event then becomes a
    separate message.
    """

    requires = ("celery.worker.consumer.events:Events", "celery.worker.consumer.tasks:Tasks")

    def __init__(self, c: Any, **kwargs: Any) -> None:
        super().__init__(c, **kwargs)
        c.reporter = self
        self._events: Any = None
        self._due: float | None = None  # the time since which an event waits for the loop

    def start(self, c: Any) -> None:
        """Called whenever Celery has connected to Redis, with a new dispatcher of events."""
        if c.hub is None or c.event_dispatcher is None:
            return
        self._due = None

        def buffered() -> None:
            """Called by every thread that adds an event."""
            if self._due is None:
                self._due = time.monotonic()
                c.hub.call_soon(c.hub.call_later, REPORT_SECONDS, report)

        def report() -> None:
            self._due = None
            if c.event_dispatcher is not None:
                c.event_dispatcher.flush()

        self._events = c.event_dispatcher
        self._events.on_send_buffered = buffered
        self._events.buffer_limit = 1024  # the buffer is full only if the loop is blocked

    def stop(self, c: Any) -> None:
        """Called when Celery's loop ends, on a lost connection to Redis or at the worker's end.

        Tasks that end after the loop of a stopping worker send their events themselves.
        """
        if self._events is not None and c.blueprint.state == CLOSE:
            self._events.on_send_buffered = self._events.flush
            self._events.flush()

    @property
    def connected(self) -> bool:
        """Whether events are sent: not while Redis is unreachable."""
        return self._events is not None and (self._due is None or time.monotonic() - self._due < _AWAY_SECONDS)

    def send(self, kind: str, job_id: str, **fields: str) -> None:
        """Send an event of a job, in order with the events of its task.

        Does not block: Celery's loop sends it with the next events of tasks.
        """
        self._events.send(kind, uuid=job_id, **fields)

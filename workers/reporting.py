"""What a worker tells Flower of its tasks, a few times a second."""

from typing import Any

from celery import bootsteps

REPORT_SECONDS = 0.1


class Reporter(bootsteps.StartStopStep):
    """Celery's bootstep that sends task events together, and not each by itself.

    Celery gathers them until its loop is free, which between short tasks is at once: each event is then a message of
    its own.
    """

    requires = ("celery.worker.consumer.events:Events", "celery.worker.consumer.tasks:Tasks")

    def __init__(self, c: Any, **kwargs: Any) -> None:
        super().__init__(c, **kwargs)
        self._due = False

    def start(self, c: Any) -> None:
        """Called whenever Celery has connected to Redis: its dispatcher of events is a new one then."""
        if c.hub is None or c.event_dispatcher is None:
            return
        self._due = False

        def buffered() -> None:
            """Called by every thread that has an event."""
            if not self._due:
                self._due = True
                c.hub.call_soon(c.hub.call_later, REPORT_SECONDS, report)

        def report() -> None:
            self._due = False
            if c.event_dispatcher is not None:
                c.event_dispatcher.flush()

        c.event_dispatcher.on_send_buffered = buffered
        c.event_dispatcher.buffer_limit = 256

"""Sends the progress of each render to Flower: a bar per job, at most once a second."""

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from farm.show.progress_text import steps_line
from workers.consumer.reporter import Reporter
from workers.render.request import Progress

log = logging.getLogger(__name__)

Renders = Callable[[], AbstractContextManager[Mapping[tuple[str, int], Progress]]]
"""The progress of each render, by job id and attempt; none of them ends before the context does."""


class ProgressBars:
    """One thread that sends the progress of a worker's renders to Flower.

    It uses the event stream of their tasks. Flower takes a bar that arrives after the end of a task for its result, so
    all bars must arrive before the task's last event. With a separate stream the task would have to wait for them.
    """

    def __init__(self, renders: Renders, seconds: float) -> None:
        self._renders = renders
        self._seconds = seconds
        self._sent: dict[tuple[str, int], int] = {}
        self._stopped = threading.Event()

    def start(self, reporter: Reporter) -> None:
        """Send every `seconds` from now on."""
        threading.Thread(target=self._run, args=(reporter,), name="progress", daemon=True).start()

    def stop(self) -> None:
        """Stop sending."""
        self._stopped.set()

    def _run(self, reporter: Reporter) -> None:
        while not self._stopped.wait(self._seconds):
            try:
                self.send(reporter)
            except Exception:
                log.exception("can't send the progress of the renders")

    def send(self, reporter: Reporter) -> None:
        """Send the bars that have changed since the last call; none while Redis is unreachable."""
        if not reporter.connected:
            return
        with self._renders() as renders:
            for (job_id, attempt), seen in renders.items():
                if seen.seconds is None or self._sent.get((job_id, attempt)) == seen.steps_done:
                    continue
                if attempt > 1 and (job_id, attempt) not in self._sent:
                    # Otherwise Flower still shows the end of the earlier attempt.
                    reporter.send("task-retried", job_id)
                reporter.send("task-progress", job_id, result=steps_line(seen.steps_done, seen.steps_total))
            self._sent = {key: seen.steps_done for key, seen in renders.items() if seen.seconds is not None}

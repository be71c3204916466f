"""How far each render is, for Flower: a bar a job, once a second at most."""

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from farm.show.progress_text import steps_line
from workers.consumer.reporter import Reporter
from workers.render.request import Progress

log = logging.getLogger(__name__)

Renders = Callable[[], AbstractContextManager[Mapping[tuple[str, int], Progress]]]
"""How far each render is, by job id and attempt; none of them ends before the context does."""


class ProgressBars:
    """One thread that tells Flower how far a worker's renders are.

    It goes through the stream that carries the other events of their tasks. Flower takes the text of a bar that comes
    after the end for the result: so nothing of a job may be told once its task is about to end, and what was told
    before must arrive before. An event stream of its own could promise neither without holding up the task.
    """

    def __init__(self, renders: Renders, seconds: float) -> None:
        self._renders = renders
        self._seconds = seconds
        self._told: dict[tuple[str, int], int] = {}
        self._stopped = threading.Event()

    def start(self, reporter: Reporter) -> None:
        """Tell from now on, every so many seconds."""
        threading.Thread(target=self._tell_on, args=(reporter,), name="progress", daemon=True).start()

    def stop(self) -> None:
        """Tell nothing more."""
        self._stopped.set()

    def _tell_on(self, reporter: Reporter) -> None:
        while not self._stopped.wait(self._seconds):
            try:
                self.tell(reporter)
            except Exception:
                log.exception("can't tell how far the renders are")

    def tell(self, reporter: Reporter) -> None:
        """Tell of those that have got further since they were told of last; of none while Redis is away."""
        if not reporter.hears:
            return
        with self._renders() as renders:
            for (job_id, attempt), seen in renders.items():
                if seen.seconds is None or self._told.get((job_id, attempt)) == seen.steps_done:
                    continue
                if attempt > 1 and (job_id, attempt) not in self._told:
                    # Flower goes on showing how an earlier attempt ended otherwise.
                    reporter.tell("task-retried", job_id)
                reporter.tell("task-progress", job_id, result=steps_line(seen.steps_done, seen.steps_total))
            self._told = {key: seen.steps_done for key, seen in renders.items() if seen.seconds is not None}

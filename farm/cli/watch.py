"""The command `watch`: a live view of batches, workers and failures, or one batch until its end."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from farm.cli.console import open_farm, out
from farm.cli.notices import announce_interrupt, print_errors
from farm.client.batch import Batch
from farm.client.farm import Farm
from farm.errors import ServiceUnavailable
from farm.jobs.records import BatchStatus, JobInfo
from farm.jobs.states import JobState
from farm.runtime.terminal_text import printable
from farm.show.farm_view import BatchLine, FarmView, draw
from farm.show.tables import batch_table

app = typer.Typer()

_REFRESH_SECONDS = 2.0
_BATCHES, _FAILURES = 12, 5
_PIPED_WIDTH = 160
_WAITING = (JobState.PENDING, JobState.QUEUED)


@app.command()
def watch(
    which: Annotated[
        str | None, typer.Argument(metavar="[BATCH]", help="A batch, by its name or id: wait until it ends.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print the current state and exit.")] = False,
) -> None:
    """Watch batches and workers until Ctrl-C, or one batch until it ends.

    On a pipe, the state is printed again after every change.
    """
    with open_farm() as farm:
        if which is not None and not once:
            if not _wait_for(farm.batch(which)):
                raise typer.Exit(1)
            return
        watcher = Watcher(farm, which)
        if once or not out.is_terminal:
            _print(watcher, once=once)
        else:
            _live(watcher)


@dataclass
class Watcher:
    """Reads the state of a farm or of a batch repeatedly, and collects the failures."""

    farm: Farm
    which: str | None = None
    last: FarmView | None = None
    _failed: dict[str, int] = field(default_factory=dict)
    _failures: deque[JobInfo] = field(default_factory=lambda: deque(maxlen=_FAILURES))

    def read(self) -> FarmView:
        """The state of the farm now; raises `ServiceUnavailable`."""
        if self.which is not None:
            statuses = [self.farm.batch(self.which).status()]
        else:
            found = {status.id: status for status in (*self.farm.moving(_BATCHES), *self.farm.batches(_BATCHES))}
            newest_first = sorted(found.values(), key=lambda status: status.created_at, reverse=True)
            statuses = sorted(newest_first, key=lambda status: status.done)[:_BATCHES]
        for status in statuses:
            self._note_failures(status)
        workers, loads = self.farm.workers(), self.farm.loads()
        missing, large = set(self.farm.unheld()), bool(self.farm.too_large())
        lines = [
            BatchLine(status, self.farm.tempo(status), self._why(status, missing, large=large)) for status in statuses
        ]
        self.last = FarmView(lines, workers, loads, tuple(self._failures))
        return self.last

    def _note_failures(self, status: BatchStatus) -> None:
        count, before = status.counts[JobState.FAILED], self._failed.get(status.id, 0)
        self._failed[status.id] = count
        if count > before:
            known = {job.id for job in self._failures}
            new = self.farm.failed(status.id, min(count - before, _FAILURES))
            fresh = [job for job in reversed(new) if job.id not in known]
            merged = sorted([*self._failures, *fresh], key=lambda job: (job.finished_at is not None, job.finished_at))
            self._failures.clear()
            self._failures.extend(merged)

    def _why(self, status: BatchStatus, missing: set[str], *, large: bool) -> str:
        if status.done or not any(status.counts[state] for state in _WAITING):
            return ""
        if status.paused:
            return "paused"
        reasons = []
        if missing and (models := self.farm.unheld(status.id)):
            reasons.append(f"no worker holds {', '.join(models)}")
        if large and (models := list(self.farm.too_large(status.id))):
            reasons.append(f"too large for every worker of {', '.join(models)}")
        return "; ".join(reasons)


def _live(watcher: Watcher) -> None:
    with Live(console=out, auto_refresh=False, transient=False) as live:
        while True:
            try:
                live.update(draw(watcher.read(), out.width), refresh=True)
            except ServiceUnavailable as error:  # an outage does not end the view
                message = Text(printable(f"{error}; trying again"), style="red")
                live.update(Group(*([draw(watcher.last, out.width)] if watcher.last else []), message), refresh=True)
            time.sleep(_REFRESH_SECONDS)


def _print(watcher: Watcher, *, once: bool) -> None:
    printed: object = None
    wide = Console(file=out.file, width=None if out.is_terminal else _PIPED_WIDTH, highlight=False)
    while True:
        view = watcher.read()
        if view.news != printed:
            wide.print(draw(view, wide.width))
            printed = view.news
        if once:
            return
        time.sleep(_REFRESH_SECONDS)


def _wait_for(batch: Batch) -> bool:
    """Wait for a batch with a progress bar and print its outcome; returns whether every job succeeded."""
    with announce_interrupt(batch):
        ended = batch.wait(progress=True)
    out.print(batch_table([ended]))
    print_errors(batch)
    return ended.counts[JobState.SUCCEEDED] == ended.total

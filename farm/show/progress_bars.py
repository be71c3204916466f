"""Progress bars on standard error; standard output is reserved for the results of a command."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from farm.jobs.states import JobState
from farm.jobs.tempo import Tempo
from farm.runtime.terminal_text import printable
from farm.show.progress_text import tempo_line


class ProgressBar:
    """One bar of a display."""

    def __init__(self, display: Progress, task: TaskID) -> None:
        self._display = display
        self._task = task

    def update(self, completed: float, note: str = "", tempo: Tempo | None = None) -> None:
        """Set the number done, a note and the pace."""
        self._display.update(self._task, completed=completed, note=note, tempo=tempo_line(tempo) if tempo else "")


@contextmanager
def progress_bar(
    description: str, total: int, *, shown: bool = True, with_tempo: bool = False
) -> Iterator[ProgressBar]:
    """A bar with count, elapsed and remaining time while the block runs; invisible unless `shown`.

    With `with_tempo` the remaining time comes from the updates, otherwise from the progress so far.
    """
    remaining = TextColumn("{task.fields[tempo]}", style="cyan") if with_tempo else TimeRemainingColumn(compact=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
        TimeElapsedColumn(),
        remaining,
    )
    with Progress(*columns, console=Console(stderr=True, quiet=not shown)) as display:
        yield ProgressBar(display, display.add_task(printable(description), total=total, note="", tempo=""))


def counts_text(counts: Mapping[JobState, int]) -> str:
    """The counts in words: `8 running, 52 queued, 1 failed`."""
    order = (JobState.RUNNING, JobState.QUEUED, JobState.PENDING, JobState.FAILED, JobState.CANCELLED)
    return ", ".join(f"{counts[state]} {state}" for state in order if counts.get(state))

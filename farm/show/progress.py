"""Progress bars on standard error; standard output is left to the results of a command."""

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


def columns(console: Console, *, told: bool = False) -> Progress:
    """A display of bars with count, elapsed and remaining time; with `told`, updates contain the latter."""
    remaining = TextColumn("{task.fields[tempo]}", style="cyan") if told else TimeRemainingColumn(compact=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
        TimeElapsedColumn(),
        remaining,
        console=console,
    )


class Bar:
    """One bar of a display."""

    def __init__(self, display: Progress, task: TaskID) -> None:
        self._display = display
        self._task = task

    def update(self, completed: float, note: str = "", tempo: Tempo | None = None) -> None:
        """Set the number done, a note and the pace."""
        self._display.update(self._task, completed=completed, note=note, tempo=tempo_line(tempo) if tempo else "")


@contextmanager
def bar(description: str, total: int, *, shown: bool = True, told: bool = False) -> Iterator[Bar]:
    """A bar while the block runs, invisible unless `shown`. With `told` every update has the pace."""
    console = Console(stderr=True, quiet=not shown)
    with columns(console, told=told) as display:
        yield Bar(display, display.add_task(printable(description), total=total, note="", tempo=""))


def note(counts: Mapping[JobState, int]) -> str:
    """The counts in words: `8 running, 52 queued, 1 failed`."""
    order = (JobState.RUNNING, JobState.QUEUED, JobState.PENDING, JobState.FAILED, JobState.CANCELLED)
    return ", ".join(f"{counts[state]} {state}" for state in order if counts.get(state))

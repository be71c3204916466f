"""Bars for whoever waits: on standard error, so that standard output stays for what a command says."""

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
    """A display of bars: what, how far, how many, since when, how much longer; `told` if the farm says that one."""
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
    """One bar that is told how far it is."""

    def __init__(self, display: Progress, task: TaskID) -> None:
        self._display = display
        self._task = task

    def update(self, completed: float, note: str = "", tempo: Tempo | None = None) -> None:
        """Show this many done, with a word beside it, and how fast it goes."""
        self._display.update(self._task, completed=completed, note=note, tempo=tempo_line(tempo) if tempo else "")


@contextmanager
def bar(description: str, total: int, *, shown: bool = True, told: bool = False) -> Iterator[Bar]:
    """A bar while the block runs; an invisible one if not `shown`. `told` if every update says how fast it goes."""
    console = Console(stderr=True, quiet=not shown)
    with columns(console, told=told) as display:
        yield Bar(display, display.add_task(printable(description), total=total, note="", tempo=""))


def note(counts: Mapping[JobState, int]) -> str:
    """What is going on, in few words: `8 running, 52 queued, 1 failed`."""
    order = (JobState.RUNNING, JobState.QUEUED, JobState.PENDING, JobState.FAILED, JobState.CANCELLED)
    return ", ".join(f"{counts[state]} {state}" for state in order if counts.get(state))

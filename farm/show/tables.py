"""Tables of batches and jobs for a terminal."""

from collections.abc import Iterable
from datetime import datetime

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from farm.jobs.records import BatchStatus, JobInfo
from farm.jobs.states import JobState
from farm.runtime.terminal_text import printable
from farm.show.progress_text import blocks

_STYLES = {
    JobState.PENDING: "dim",
    JobState.QUEUED: "cyan",
    JobState.RUNNING: "yellow",
    JobState.SUCCEEDED: "green",
    JobState.FAILED: "red",
    JobState.CANCELLED: "magenta",
}


def state_style(state: JobState) -> str:
    """The colour of a state."""
    return _STYLES[state]


def batch_table(batches: Iterable[BatchStatus]) -> RenderableType:
    """One line per batch: progress, and the states of its jobs."""
    table = Table("batch", "done", "", "jobs", "submitted", box=None, header_style="bold")
    for batch in batches:
        counts = Text("paused  ", style="bold") if batch.paused else Text()
        for state, count in batch.counts.items():
            if count:
                counts.append(f"{count} {state}  ", style=_STYLES[state])
        table.add_row(
            Text(printable(batch.id), no_wrap=True),
            f"{batch.ended}/{batch.total}",
            _bar(batch.ended / max(1, batch.total)),
            counts,
            _when(batch.created_at),
        )
    return table


def _when(moment: datetime) -> Text:
    here = moment.astimezone()
    today = here.date() == datetime.now(here.tzinfo).date()
    return Text(here.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M"), no_wrap=True)


def _bar(fraction: float, width: int = 16) -> Text:
    full, empty = blocks(fraction, width)
    return Text(full, style="green").append(empty, style="dim")


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g} s" if value < 100 else f"{value / 60:.0f} min"


def job_table(jobs: Iterable[JobInfo], *, whole: bool = False) -> RenderableType:
    """One line per job; with `whole` also its pace and its full prompt."""
    pace = ("s/step", "left") if whole else ()
    table = Table("job", "state", "steps", *pace, "worker", "prompt", "what", box=None, header_style="bold")
    for job in jobs:
        prompt = printable(job.spec.prompt)
        table.add_row(
            Text(printable(job.id)),
            Text(job.state, style=_STYLES[job.state]),
            f"{job.steps_done}/{job.spec.num_inference_steps}",
            *((_seconds(job.seconds_per_step), _seconds(job.eta_seconds)) if whole else ()),
            Text(printable(job.worker or "")),
            Text(prompt if whole or len(prompt) < 60 else prompt[:59] + "…"),
            Text(printable(job.error or (job.picture.key if job.picture else ""))),
        )
    return table

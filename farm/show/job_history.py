"""Formats a job for a terminal: its spec, its attempts, the address of its picture."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from farm.jobs.records import AttemptInfo, JobInfo
from farm.jobs.states import JobState, Outcome
from farm.runtime.terminal_text import printable
from farm.show.tables import state_style

_OUTCOMES = {
    Outcome.SUCCEEDED: "green",
    Outcome.FAILED: "red",
    Outcome.RETRIED: "yellow",
    Outcome.LOST: "red",
    Outcome.HANDED_BACK: "cyan",
    Outcome.CANCELLED: "magenta",
}


def job_history(job: JobInfo, attempts: Sequence[AttemptInfo], place: str | None) -> RenderableType:
    """A job with all its attempts; `place` is the address of its picture."""
    facts = Table(box=None, show_header=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(job, place):
        facts.add_row(name, value if isinstance(value, Text) else Text(printable(value)))
    return Group(facts, Text(), _table([*attempts]), *_under_way(job))


def _facts(job: JobInfo, place: str | None) -> Iterable[tuple[str, str | Text]]:
    yield "job", job.id
    yield "state", Text(job.state, style=state_style(job.state)) + Text("  paused" if job.paused else "")
    for name, value in job.spec.model_dump(exclude_none=True).items():
        if name == "prompt" or value != type(job.spec).model_fields[name].default:
            yield name, str(value)
    yield "tries", f"{job.tries} errors, {job.lost_leases} lost workers, {job.attempt} attempts"
    if job.not_before is not None and job.state is JobState.PENDING:
        yield "not before", _moment(job.not_before)
    if job.avoid_worker is not None:
        yield "avoids", f"{job.avoid_worker}, which had no memory for it"
    if job.error is not None:
        yield "error", job.error
    if job.reused_from is not None:
        yield "copy of", job.reused_from
    if job.picture is not None:
        yield "picture", place or job.picture.key
        yield "sha256", job.picture.sha256
    for warning in job.picture.warnings if job.picture else ():
        yield "warning", warning


def _table(attempts: Iterable[AttemptInfo]) -> Table:
    table = Table("attempt", "worker", "began", "took", "steps", "outcome", "why", box=None, header_style="bold")
    for one in attempts:
        why = " ".join(part for part in (f"[{one.error_class}]" if one.error_class else "", one.reason or "") if part)
        table.add_row(
            str(one.attempt),
            Text(printable(one.worker or "")),
            _moment(one.started_at),
            "" if one.seconds is None else f"{one.seconds:.1f} s",
            str(one.steps_done),
            Text(one.outcome, style=_OUTCOMES[one.outcome]),
            Text(printable(why)),
        )
    return table


def _under_way(job: JobInfo) -> Iterable[Text]:
    if job.state is JobState.RUNNING:
        where = f"attempt {job.attempt} renders on {job.worker} since {_moment(job.started_at)}"
        steps = f"step {job.steps_done} of {job.spec.num_inference_steps}"
        yield Text(printable(f"{where}: {steps}"), style="yellow")


def _moment(moment: datetime | None) -> str:
    return "" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")

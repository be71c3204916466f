"""The command `watch`: batches on their way, who works on them, and what fails, as it happens."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from farm.cli.console import complain, open_farm, out
from farm.client.batch import Batch
from farm.client.farm import Farm
from farm.errors import ServiceUnavailable
from farm.jobs.overview import Load
from farm.jobs.records import BatchStatus, JobInfo, WorkerInfo
from farm.jobs.states import JobState
from farm.jobs.tempo import Tempo
from farm.runtime.terminal_text import printable
from farm.show.progress_text import blocks, duration, rate
from farm.show.tables import batch_table, job_table, state_style
from farm.version import __version__

app = typer.Typer()

T = TypeVar("T")

_LOOK_SECONDS = 2.0
_BATCHES, _WORKERS, _FAILURES = 12, 16, 5
_WIDE, _NARROW, _TINY = 100, 80, 44
"""From how many columns on there is room for all, and below how many for less, and for least."""
_CUT = ("batch", "jobs", "worker", "models")
_PIPED_WIDTH = 160
_WRONG = 20
_WAITING = (JobState.PENDING, JobState.QUEUED)


@app.command()
def watch(
    which: Annotated[str | None, typer.Argument(metavar="[BATCH]", help="One batch, to its end.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Show how it stands now, and no more.")] = False,
) -> None:
    """Watch batches and workers, live, until Ctrl-C; or one batch until it ends.

    Where this is no terminal, how it stands is said again whenever something has changed.
    """
    with open_farm() as farm:
        if which is not None and not once:
            if not see_through(farm.batch(which)):
                raise typer.Exit(1)
            return
        looker = Looker(farm, which)
        if once or not out.is_terminal:
            _print(looker, once=once)
        else:
            _live(looker)


def _live(looker: "Looker") -> None:
    with Live(console=out, auto_refresh=False, transient=False) as live:
        while True:
            try:
                live.update(shown(looker.look(), out.width), refresh=True)
            except ServiceUnavailable as error:  # a night's watch outlasts that
                away = Text(printable(f"{error}; trying again"), style="red")
                live.update(Group(*([shown(looker.last, out.width)] if looker.last else []), away), refresh=True)
            time.sleep(_LOOK_SECONDS)


def _print(looker: "Looker", *, once: bool) -> None:
    said: object = None
    wide = Console(file=out.file, width=None if out.is_terminal else _PIPED_WIDTH, highlight=False)
    while True:
        view = looker.look()
        if view.news != said:
            wide.print(shown(view, wide.width))
            said = view.news
        if once:
            return
        time.sleep(_LOOK_SECONDS)


# --- what there is to see -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One batch as it stands."""

    status: BatchStatus
    tempo: Tempo
    why: str
    """Why jobs of it wait, if they wait for more than their turn."""


@dataclass(frozen=True)
class View:
    """The farm as it stands."""

    batches: Sequence[Line]
    workers: Sequence[WorkerInfo]
    loads: Mapping[str, Load]
    failures: Sequence[JobInfo]
    """The last ones, newest last."""

    @property
    def news(self) -> object:
        """What makes another look worth showing where nobody wants to see every one: not the pace of things."""
        return (
            [(line.status.id, tuple(line.status.counts.items()), line.why) for line in self.batches],
            [(one.name, one.alive, one.held) for one in self.workers],
            [job.id for job in self.failures],
        )


@dataclass
class Looker:
    """Looks at a farm, or at one batch of it, again and again, and remembers which failures it has seen."""

    farm: Farm
    which: str | None = None
    last: View | None = None
    _failed: dict[str, int] = field(default_factory=dict)
    _failures: deque[JobInfo] = field(default_factory=lambda: deque(maxlen=_FAILURES))

    def look(self) -> View:
        """How the farm stands now; raises `ServiceUnavailable`."""
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
        lines = [Line(status, self.farm.tempo(status), self._why(status, missing, large=large)) for status in statuses]
        self.last = View(lines, workers, loads, tuple(self._failures))
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


# --- how it looks ---------------------------------------------------------------------------------------------------


def shown(view: View, width: int) -> RenderableType:
    """A view, for a terminal of so many columns: what matters least is left out where it is narrow."""
    parts: list[RenderableType] = []
    if view.batches:
        parts += [_batches(view.batches, width), Text()]
    else:
        parts.append(Text("no batches yet: `farm submit` hands one in\n"))
    if view.workers:
        parts.append(_workers(view.workers[:_WORKERS], view.loads, width))
        if len(view.workers) > _WORKERS:
            parts.append(Text(f"… and {len(view.workers) - _WORKERS} workers more: farm models", style="dim"))
    else:
        parts.append(Text("no worker is there: `farm worker` starts one", style="red"))
    if view.failures:
        parts += [Text(), *(_failure(job) for job in view.failures)]
    return Group(*parts)


def _table(*columns: str) -> Table:
    """Names and words are cut short where there is no room; numbers are not."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=name not in _CUT, min_width=8 if name in _CUT else None)
    return table


def _words(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style, no_wrap=True, overflow="ellipsis")


def _batches(lines: Iterable[Line], width: int) -> Table:
    wide, narrow, tiny = width >= _WIDE, width < _NARROW, width < _TINY
    table = _table("batch", *_only(not tiny, ""), "done", *_only(not narrow, "rate"), "ETA", *_only(not narrow, "jobs"))
    for line in lines:
        status = line.status
        full, empty = blocks(status.ended / max(1, status.total), 16 if wide else 8)
        percent = f"{100 * status.ended // max(1, status.total)}%"
        eta = duration(line.tempo.eta_seconds) if line.tempo.eta_seconds is not None else ""
        table.add_row(
            _words(status.id, "dim" if status.done else ""),
            *_only(not tiny, Text(full, style="green").append(empty, style="dim")),
            Text(percent if narrow else f"{status.ended}/{status.total}"),
            *_only(not narrow, Text("" if line.tempo.per_second is None else rate(line.tempo.per_second))),
            _words(line.why, "bold") if narrow and line.why else Text(eta),
            *_only(not narrow, _states(line)),
        )
    return table


def _states(line: Line) -> Text:
    text = _words(f"{line.why}  " if line.why else "", "bold")
    for state, count in line.status.counts.items():
        if count:
            text.append(f"{count} {state}  ", style=f"not bold {state_style(state)}")
    return text


def _workers(workers: Iterable[WorkerInfo], loads: Mapping[str, Load], width: int) -> Table:
    wide, narrow, tiny = width >= _WIDE, width < _NARROW, width < _TINY
    table = _table(
        "worker",
        *_only(not narrow, "device"),
        *_only(not tiny, "memory"),
        "slots",
        "s/step",
        *_only(not narrow, "models"),
    )
    for one in workers:
        load = loads.get(one.name, Load(0, None))
        held = _words(", ".join(one.held)) if one.alive else _words("no sign of life", "red")
        other = "" if one.version == __version__ else f" ({one.version})"  # as in the midst of an upgrade
        table.add_row(
            _words(f"{one.name}{other}", "" if one.alive else "red"),
            *_only(not narrow, Text(printable(f"{one.device} {one.dtype}" if wide else one.device))),
            *_only(not tiny, Text(_memory(one.memory))),
            Text(f"{min(load.renders, one.slots)}/{one.slots}"),
            Text("" if load.seconds_per_step is None else f"{load.seconds_per_step:.3g}"),
            *_only(not narrow, held),
        )
    return table


def _only(wanted: bool, what: T) -> list[T]:
    return [what] if wanted else []


def _memory(memory: tuple[int, int] | None) -> str:
    if memory is None:
        return ""
    used, there_is = (size / 2**30 for size in memory)
    return f"{used:.1f}/{there_is:.0f}G"


def _failure(job: JobInfo) -> Text:
    when = job.finished_at.astimezone().strftime("%H:%M:%S ") if job.finished_at else ""
    text = Text(f"{when}{printable(job.id)} ", style="red", no_wrap=True, overflow="ellipsis")
    return text.append(printable(job.error or "failed"), style="not dim default")


# --- one batch ------------------------------------------------------------------------------------------------------


def see_through(batch: Batch) -> bool:
    """Wait for a batch behind a bar, and say how it ended; whether every job of it succeeded."""
    with interrupted(batch):
        ended = batch.wait(progress=True)
    out.print(batch_table([ended]))
    say_wrong(batch)
    return ended.counts[JobState.SUCCEEDED] == ended.total


def say_wrong(batch: Batch) -> None:
    """The first of its jobs that have an error: found without a look at the others."""
    if wrong := [job.info for job in batch.wrong(_WRONG + 1)]:
        out.print(job_table(wrong[:_WRONG]))
        if len(wrong) > _WRONG:
            out.print(Text(f"… and more: farm jobs {batch.id} --wrong --limit 1000"), soft_wrap=True)


@contextmanager
def interrupted(batch: Batch) -> Iterator[None]:
    """Whoever waits no longer is told that the batch goes on."""
    try:
        yield
    except KeyboardInterrupt:
        complain(f"{batch.id} goes on; `farm watch {batch.id}` waits again, `farm cancel {batch.id}` ends it")
        raise

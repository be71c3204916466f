"""A live view of a farm for a terminal of any width: batches, workers and the last failures."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from farm.jobs.overview import Load
from farm.jobs.records import BatchStatus, JobInfo, WorkerInfo
from farm.jobs.tempo import Tempo
from farm.runtime.terminal_text import printable
from farm.show.progress_text import blocks, duration, rate
from farm.show.tables import state_style
from farm.version import __version__

T = TypeVar("T")

_WORKERS = 16
_WIDE, _NARROW, _TINY = 100, 80, 44
"""Widths in columns: from `_WIDE` on, everything is shown; below `_NARROW` and `_TINY`, less and least."""
_CUT = ("batch", "jobs", "worker", "models")


@dataclass(frozen=True)
class BatchLine:
    """One batch and its progress."""

    status: BatchStatus
    tempo: Tempo
    why: str
    """Why its jobs wait, if they wait for more than their turn."""


@dataclass(frozen=True)
class FarmView:
    """The state of a farm at one moment."""

    batches: Sequence[BatchLine]
    workers: Sequence[WorkerInfo]
    loads: Mapping[str, Load]
    failures: Sequence[JobInfo]
    """The last failed jobs, newest last."""

    @property
    def news(self) -> object:
        """The facts whose change prints the view again on a pipe; equal while only the pace changes."""
        return (
            [(line.status.id, tuple(line.status.counts.items()), line.why) for line in self.batches],
            [(worker.name, worker.alive, worker.held) for worker in self.workers],
            [job.id for job in self.failures],
        )


def draw(view: FarmView, width: int) -> RenderableType:
    """The view for a terminal of this width; a narrow terminal gets only the most important columns."""
    parts: list[RenderableType] = []
    if view.batches:
        parts += [_batches(view.batches, width), Text()]
    else:
        parts.append(Text("no batches yet: `farm submit` submits one\n"))
    if view.workers:
        parts.append(_workers(view.workers[:_WORKERS], view.loads, width))
        if len(view.workers) > _WORKERS:
            parts.append(Text(f"… and {len(view.workers) - _WORKERS} more workers: farm models", style="dim"))
    else:
        parts.append(Text("no workers: `farm worker` starts one", style="red"))
    if view.failures:
        parts += [Text(), *(_failure(job) for job in view.failures)]
    return Group(*parts)


def _table(*columns: str) -> Table:
    """A table that truncates names and words if necessary, but never numbers."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=name not in _CUT, min_width=8 if name in _CUT else None)
    return table


def _words(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style, no_wrap=True, overflow="ellipsis")


def _batches(lines: Iterable[BatchLine], width: int) -> Table:
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


def _states(line: BatchLine) -> Text:
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
    for worker in workers:
        load = loads.get(worker.name, Load(0, None))
        held = _words(", ".join(worker.held)) if worker.alive else _words("no sign of life", "red")
        other = "" if worker.version == __version__ else f" ({worker.version})"  # during an upgrade
        table.add_row(
            _words(f"{worker.name}{other}", "" if worker.alive else "red"),
            *_only(not narrow, Text(printable(f"{worker.device} {worker.dtype}" if wide else worker.device))),
            *_only(not tiny, Text(_memory(worker.memory))),
            Text(f"{min(load.renders, worker.slots)}/{worker.slots}"),
            Text("" if load.seconds_per_step is None else f"{load.seconds_per_step:.3g}"),
            *_only(not narrow, held),
        )
    return table


def _only(wanted: bool, cell: T) -> list[T]:
    return [cell] if wanted else []


def _memory(memory: tuple[int, int] | None) -> str:
    if memory is None:
        return ""
    used, total = (size / 2**30 for size in memory)
    return f"{used:.1f}/{total:.0f}G"


def _failure(job: JobInfo) -> Text:
    when = job.finished_at.astimezone().strftime("%H:%M:%S ") if job.finished_at else ""
    text = Text(f"{when}{printable(job.id)} ", style="red", no_wrap=True, overflow="ellipsis")
    return text.append(printable(job.error or "failed"), style="not dim default")

"""Rows of the table, from the runs of two sides."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.apart import Run


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    number: int
    what: str
    value: float
    unit: str
    goal: str
    met: bool | None
    """None without a goal."""
    spread: tuple[float, float] | None = None
    """The lowest and the highest value of the repeats."""
    farm: str = ""
    other: str = ""
    farm_bytes: int = 0
    other_bytes: int = 0


def faster(
    number: int, what: str, goal: float | None, farm: Sequence[Run], other: Sequence[Run], *, latency: bool = False
) -> Row:
    """A row with the farm's speed relative to the other side: medians, and the spread of the pairs of runs."""
    ratios = [ours.rate / theirs.rate for ours, theirs in zip(farm, other, strict=True)]
    ratio = rate(farm) / rate(other)
    shown = [f"{rate(runs):.2f} images/s" for runs in (farm, other)]
    if latency:
        for place, runs in enumerate((farm, other)):
            for percent in (50, 95):
                shown[place] += f", p{percent} {median(run.latency(percent) for run in runs):.1f} s"
    return Row(
        number,
        what,
        ratio,
        "",
        "" if goal is None else f"≥ {goal:g}",
        None if goal is None else ratio >= goal,
        (min(ratios), max(ratios)),
        shown[0],
        shown[1],
        max(run.peak_bytes for run in farm),
        max(run.peak_bytes for run in other),
    )


def rate(runs: Sequence[Run]) -> float:
    """The median rate, in images per second."""
    return median(run.rate for run in runs)

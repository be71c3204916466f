"""One line of the table, and how the runs of two sides become one."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.apart import Run


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    number: int
    what: str
    value: float
    unit: str
    goal: str
    met: bool | None
    """None where there is no goal."""
    spread: tuple[float, float] | None = None
    """Of the repeats: the lowest and the highest."""
    farm: str = ""
    other: str = ""
    farm_bytes: int = 0
    other_bytes: int = 0


def faster(
    number: int, what: str, goal: float | None, farm: Sequence[Run], other: Sequence[Run], *, latency: bool = False
) -> Row:
    """How much faster the farm is than the other side, as a row: medians, and the spread of the pairs of runs."""
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
    """The median of their images a second."""
    return median(run.rate for run in runs)

"""How fast a batch goes, when it ends, and how far something is, in a line of text: the same for all who show it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

_WINDOW_SECONDS, _AT_LEAST = 60.0, 8
MOST_ENDINGS = 128
"""How many of a batch's last endings its rate is made of, at most."""
_BAR = 12


@dataclass(frozen=True)
class Tempo:
    """How fast a batch goes."""

    per_second: float | None = None
    """Pictures; None while nothing tells."""
    eta_seconds: float | None = None
    """Until its last job has ended, at that rate; None while nothing tells, or while it is paused."""

    def __str__(self) -> str:
        parts = (
            rate(self.per_second) if self.per_second is not None else "",
            f"ETA {duration(self.eta_seconds)}" if self.eta_seconds is not None else "",
        )
        return " ".join(filter(None, parts))


def tempo(
    left: float, endings: Sequence[datetime], now: datetime, paces: Sequence[float] = (), *, paused: bool = False
) -> Tempo:
    """How fast a batch goes of which so many jobs are left.

    By how many jobs ended in the last minute, or by its last eight where those are fewer: a batch that stands still
    gets slower by the second. `endings` are the times of its last endings, newest first, at most `MOST_ENDINGS`. Before
    its second one `paces` tell, the pictures a second that each of its running jobs is to make of its measured steps.
    """
    if left <= 0:
        return Tempo()
    counted = [end for place, end in enumerate(endings) if place < _AT_LEAST or _since(end, now) < _WINDOW_SECONDS]
    per_second: float | None = sum(paces) or None
    if len(counted) > 1:
        # One less: the first of them tells when the others began to be counted.
        per_second = (len(counted) - 1) / max(0.001, _since(counted[-1], now))
    return Tempo(per_second, None if paused or per_second is None else left / per_second)


def _since(moment: datetime, now: datetime) -> float:
    return (now - moment).total_seconds()


def blocks(fraction: float, width: int = _BAR) -> tuple[str, str]:
    """The full and the empty part of a bar; full only when all is done."""
    full = min(max(0, int(fraction * width + 0.5)), width if fraction >= 1 else width - 1)
    return "█" * full, "░" * (width - full)


def steps_line(steps_done: int, steps: int) -> str:
    """`███████░░░░░ 60% step 12/20`."""
    return f"{_share(steps_done, steps)} step {steps_done}/{steps}"


def jobs_line(ended: int, total: int, speed: Tempo, note: str = "") -> str:
    """`████░░░░░░░░ 312/1000 31% 4.2/s ETA 2m 44s`, and a word on it."""
    full, empty = blocks(ended / max(1, total))
    parts = (f"{full}{empty} {ended}/{total} {_percent(ended, total)}", str(speed), note)
    return " ".join(filter(None, parts))


def _share(done: int, of: int) -> str:
    full, empty = blocks(done / max(1, of))
    return f"{full}{empty} {_percent(done, of)}"


def _percent(done: int, of: int) -> str:
    return f"{100 * done // max(1, of)}%"


def rate(per_second: float) -> str:
    """`4.2/s`, or `2.5/min` and `3.1/h` for what is slower."""
    for unit, seconds in (("s", 1), ("min", 60)):
        if per_second * seconds >= 1:
            return f"{per_second * seconds:.{0 if per_second * seconds >= 100 else 1}f}/{unit}"
    return f"{per_second * 3600:.1f}/h"


def duration(seconds: float) -> str:
    """`45s`, `2m 44s`, `3h 05m`, `2d 03h`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02}h"

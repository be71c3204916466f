"""The speed of a batch, and its expected end."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

_WINDOW_SECONDS, _AT_LEAST = 60.0, 8
MOST_ENDINGS = 128
"""At most so many of a batch's last endings determine its speed."""


@dataclass(frozen=True)
class Tempo:
    """The speed of a batch, and the time until its end."""

    per_second: float | None = None
    """Pictures per second; None if unknown."""
    eta_seconds: float | None = None
    """Until its last job has ended, at that speed; None if unknown, or while the batch is paused."""


def tempo(
    left: float, endings: Sequence[datetime], now: datetime, paces: Sequence[float] = (), *, paused: bool = False
) -> Tempo:
    """Return the speed of a batch with `left` jobs that have not ended.

    Counts the jobs that ended in the last minute, or the last eight if those are fewer: the speed of a stalled batch
    falls by the second. `endings` are the times of its last endings, newest first, at most `MOST_ENDINGS`. Before the
    second ending, the speed is the sum of `paces`: the pictures per second of each running job, by its measured steps.
    """
    if left <= 0:
        return Tempo()
    counted = [end for place, end in enumerate(endings) if place < _AT_LEAST or _since(end, now) < _WINDOW_SECONDS]
    per_second: float | None = sum(paces) or None
    if len(counted) > 1:
        # One less: the earliest ending is the start of the interval.
        per_second = (len(counted) - 1) / max(0.001, _since(counted[-1], now))
    return Tempo(per_second, None if paused or per_second is None else left / per_second)


def _since(moment: datetime, now: datetime) -> float:
    return (now - moment).total_seconds()

"""How fast a batch goes, and when it will end."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

_WINDOW_SECONDS, _AT_LEAST = 60.0, 8
MOST_ENDINGS = 128
"""How many of a batch's last endings its rate is made of, at most."""


@dataclass(frozen=True)
class Tempo:
    """How fast a batch goes."""

    per_second: float | None = None
    """Pictures; None while nothing tells."""
    eta_seconds: float | None = None
    """Until its last job has ended, at that rate; None while nothing tells, or while it is paused."""


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

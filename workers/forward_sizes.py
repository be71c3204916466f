"""How many rows a forward should have: measured for each (weights, shape, dtype, device), and kept on disk."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

log = logging.getLogger(__name__)

GAIN = 0.02
"""By how much more rows a second a larger forward must bring: below that it only makes everybody wait longer."""
_MEASURE_SECONDS = 30.0
_REPEATS = 3
_SLOW_SECONDS = 1.0
"""From this long on one repeat is enough."""
NO_LIMIT = 2**31


@dataclass
class Curve:
    """What is known of forwards of one kind."""

    seconds: dict[int, float] = field(default_factory=dict)
    """Of one forward, by its rows."""
    most: int = NO_LIMIT
    """More rows than this did not fit into memory."""

    @property
    def best(self) -> int:
        """The rows that give most of them a second; fewer where more bring next to nothing."""
        sizes = sorted(rows for rows in self.seconds if rows <= self.most)
        if not sizes:
            return self.most
        best = sizes[0]
        for rows in sizes[1:]:
            if rows / self.seconds[rows] > (1 + GAIN) * best / self.seconds[best]:
                best = rows
        return best

    def bucket(self, rows: int) -> int:
        """The smallest measured size that holds so many rows; as they are if none does."""
        return min((size for size in self.seconds if rows <= size <= self.most), default=rows)


class ForwardSizes:
    """Curves by what they were measured for, in memory and in a JSON file that workers of one machine may share.

    A file that can't be read or written costs measuring again, nothing else. Safe to use from many threads.
    """

    def __init__(self, path: Path | None = None, most_rows: int = 32) -> None:
        self._path = path
        self._most_rows = most_rows
        self._curves: dict[str, Curve] = {}
        self._lock = threading.Lock()

    def curve(self, kind: str) -> Curve | None:
        """What is known of a kind of forward; None if nothing is."""
        with self._lock:
            if kind not in self._curves and (kept := self._read().get(kind)):
                self._curves[kind] = kept
            return self._curves.get(kind)

    def measure(self, kind: str, forward: Callable[[int], None], out_of_memory: type[Exception]) -> Curve:
        """Time forwards of 1, 2, 4, … rows until more bring nothing; `forward` runs one, and returns when it is done."""
        curve, began, rows = Curve(), time.monotonic(), 1
        while rows <= self._most_rows and time.monotonic() - began < _MEASURE_SECONDS:
            try:
                curve.seconds[rows] = _timed(forward, rows)
            except out_of_memory:
                curve.most = max(1, rows // 2)
                break
            if curve.best <= rows // 4:  # two doublings without a gain
                break
            rows *= 2
        with self._lock:
            self._curves[kind] = curve
            self._write()
        shown = " ".join(f"{rows}:{1000 * seconds / rows:.1f}" for rows, seconds in curve.seconds.items())
        log.info("measured forward=%s best=%d rows, ms a row: %s", kind, curve.best, shown)
        return curve

    def too_large(self, kind: str, rows: int) -> None:
        """Correct a curve: so many rows did not fit after all."""
        with self._lock:
            curve = self._curves.setdefault(kind, Curve())
            curve.most = max(1, min(curve.most, rows - 1))
            self._write()

    def _read(self) -> dict[str, Curve]:
        if self._path is None:
            return {}
        try:
            kept = json.loads(self._path.read_text())
            return {
                kind: Curve({int(rows): float(took) for rows, took in found["seconds"].items()}, int(found["most"]))
                for kind, found in kept.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("can't read the measured forward sizes in %s (%s): measuring again", self._path, error)
            return {}

    def _write(self) -> None:
        if self._path is None:
            return
        everything = {
            kind: {"seconds": {str(rows): round(took, 6) for rows, took in curve.seconds.items()}, "most": curve.most}
            for kind, curve in {**self._read(), **self._curves}.items()
        }
        partial = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(everything, indent=1, sort_keys=True))
            partial.replace(self._path)
        except OSError as error:
            log.warning("can't keep the measured forward sizes in %s: %s", self._path, error)


def _timed(forward: Callable[[int], None], rows: int) -> float:
    """Seconds of one forward, after one that warms up."""
    forward(rows)
    took: list[float] = []
    while len(took) < _REPEATS and sum(took) < _SLOW_SECONDS:
        began = time.monotonic()
        forward(rows)
        took.append(time.monotonic() - began)
    return median(took)

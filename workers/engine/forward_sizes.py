"""The best number of rows of a forward, measured for each (weights, shape, dtype, device) and kept on disk."""

import json
import logging
import threading
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from farm.runtime.atomic_files import write_atomic
from workers.engine.step_scheduler import ForwardKey
from workers.render.failures import shape_text
from workers.render.pipeline import Pipeline
from workers.render.request import RenderRequest

log = logging.getLogger(__name__)

GAIN = 0.02
"""The least gain in rows per second of a larger forward: below it, it only makes its requests wait longer."""
_MEASURE_SECONDS = 30.0
_REPEATS = 3
_SLOW_SECONDS = 1.0
"""A forward that takes longer is not repeated."""
NO_LIMIT = 2**31
FIXED_ROWS = 8
"""Rows of a deterministic forward: the same for all workers, so that all render the same bytes."""


@dataclass
class Curve:
    """The measured times of a forward by its number of rows."""

    seconds: dict[int, float] = field(default_factory=dict)
    """The time of a forward, by its rows."""
    most: int = NO_LIMIT
    """The most rows that fit into memory."""

    @property
    def best(self) -> int:
        """The rows with the highest throughput, or fewer if more rows gain less than `GAIN`."""
        sizes = sorted(rows for rows in self.seconds if rows <= self.most)
        if not sizes:
            return self.most
        best = sizes[0]
        for rows in sizes[1:]:
            if rows * self.seconds[best] > (1 + GAIN) * best * self.seconds[rows]:
                best = rows
        return best

    def bucket(self, rows: int) -> int:
        """The smallest measured size of at least that many rows; else the number itself."""
        return min((size for size in self.seconds if rows <= size <= self.most), default=rows)


class ForwardSizes:
    """The curves of a worker, in memory and in a JSON file that the workers of a machine may share.

    If the file can't be read or written, forwards are measured again. Without `measured` forwards are not limited. All
    methods may be called from any thread, except `measure`: only from the thread that owns the model.
    """

    def __init__(self, path: Path | None = None, slots: int = 16, *, measured: bool = True) -> None:
        self._path = path
        self._slots = slots
        self._measured = measured
        self._curves: dict[str, Curve] = {}
        self._fixed: dict[ForwardKey, bool] = {}
        self._limits: dict[ForwardKey, int] = {}
        self._lock = threading.Lock()

    def __contains__(self, key: ForwardKey) -> bool:
        """Whether the limit of a key is known."""
        return key in self._limits

    @property
    def largest(self) -> int:
        """The largest known limit; 0 if no limit is known."""
        return max(self._limits.values(), default=0)

    def limit(self, key: ForwardKey) -> int:
        """The most rows of a forward of this key; 1 until it is measured."""
        return self._limits.get(key, 1)

    def measure(self, pipeline: Pipeline, key: ForwardKey, request: RenderRequest) -> int:
        """Find the limit of a key, by timing forwards unless the file has them; `request` is any request of the key."""
        self._limits[key] = self._best_rows(pipeline, key, request)
        return self._limits[key]

    def _best_rows(self, pipeline: Pipeline, key: ForwardKey, request: RenderRequest) -> int:
        template = copy(request)
        template.rows = 1
        template.conditioning = {name: part[-1:] for name, part in template.conditioning.items()}
        try:
            if key.deterministic:
                self._fixed[key] = _same_everywhere(pipeline, template)
                return FIXED_ROWS if self._fixed[key] else 1
            if not self._measured:
                return NO_LIMIT
            kind = _kind(pipeline, key)
            return (self._curve(kind) or self._measure(kind, pipeline, template)).best
        except torch.AcceleratorError:
            raise
        except Exception:
            log.warning("can't measure forwards of %s: one request a forward", key, exc_info=True)
            return request.rows

    def split(self, key: ForwardKey, rows: Sequence[int]) -> list[slice]:
        """Split the requests of a key, given their rows, into forwards: only one unless the limit has shrunk."""
        cuts, room = list[int](), 0
        for place, count in enumerate(rows):
            if count > room:
                cuts.append(place)
                room = max(count, self.limit(key))
            room -= count
        return [slice(begin, end) for begin, end in pairwise([*cuts, len(rows)])]

    def padded_rows(self, pipeline: Pipeline, key: ForwardKey, requests: Sequence[RenderRequest]) -> int | None:
        """The rows to which a forward is padded: fixed if deterministic, a measured size if compiled, else None."""
        if key.deterministic:
            return FIXED_ROWS if self._fixed.get(key) else None
        if not pipeline.compiled:
            return None
        curve = self._curve(_kind(pipeline, key))
        return curve.bucket(sum(request.rows for request in requests)) if curve else None

    def shrink(self, pipeline: Pipeline, key: ForwardKey, rows: int) -> None:
        """Lower the limit of a key, and correct its curve, after a forward of that many rows ran out of memory."""
        self._limits[key] = max(1, min(self.limit(key), rows // 2))
        with self._lock:
            curve = self._curves.setdefault(_kind(pipeline, key), Curve())
            curve.most = max(1, min(curve.most, rows - 1))
            self._write()

    def _curve(self, kind: str) -> Curve | None:
        with self._lock:
            if kind not in self._curves and (kept := self._read().get(kind)):
                self._curves[kind] = kept
            curve = self._curves.get(kind)
            return curve if curve and curve.seconds else None

    def _measure(self, kind: str, pipeline: Pipeline, template: RenderRequest) -> Curve:
        """Time forwards of 1, 2, 4, … rows until more rows gain nothing."""
        known = self._curves.get(kind, Curve())  # without times: only the size that ran out of memory is known
        curve, began, rows = Curve(most=known.most), time.monotonic(), 1
        most = self._slots * pipeline.guidance.factor
        while rows <= min(most, curve.most) and time.monotonic() - began < _MEASURE_SECONDS:
            try:
                curve.seconds[rows] = _timed(pipeline, [template] * rows)
            except torch.OutOfMemoryError:
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
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path, json.dumps(everything, indent=1, sort_keys=True))
        except OSError as error:
            log.warning("can't keep the measured forward sizes in %s: %s", self._path, error)


def _timed(pipeline: Pipeline, requests: list[RenderRequest]) -> float:
    """The time of a forward, after a warm-up forward."""
    took: list[float] = []
    while len(took) <= _REPEATS and sum(took[1:]) < _SLOW_SECONDS:
        began = time.monotonic()
        if pipeline.denoise(requests).is_cuda:
            torch.cuda.synchronize(pipeline.device)
        took.append(time.monotonic() - began)
    return min(took[1:])  # other load on the machine only adds to it


def _kind(pipeline: Pipeline, key: ForwardKey) -> str:
    where = torch.cuda.get_device_name(pipeline.device) if pipeline.device.type == "cuda" else "cpu"
    texts = f"+{key.text_tokens}" if key.text_tokens else ""
    threads = torch.get_num_threads()
    return f"{pipeline.sha256[:16]} {shape_text(key.shape)}{texts} {key.dtype} {where} {threads} threads"


def _same_everywhere(pipeline: Pipeline, template: RenderRequest) -> bool:
    """Whether a row's output is the same, bit for bit, at each position in a forward and beside any other rows."""
    generator, other = torch.Generator().manual_seed(0), copy(template)
    seen = []
    for place in range(FIXED_ROWS):
        other.latents = torch.randn(template.latents.shape, generator=generator).to(template.latents.device)
        rows = [other] * FIXED_ROWS
        rows[place] = template
        seen.append(pipeline.denoise(rows, FIXED_ROWS)[place])
    return all(torch.equal(seen[0], row) for row in seen)

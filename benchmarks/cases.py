"""The eight measurements, and their goals."""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from benchmarks import work
from benchmarks.apart import Checkpoints, Run
from benchmarks.ceiling import PRODUCT_SIDE, ceiling
from benchmarks.parity import Parity
from benchmarks.rows import Row, faster, rate
from farm.settings import Settings

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 30.0
"""A worker's default interval of checkpoints."""
_LONG = 900
"""Steps of background work that should not end; with 1000 steps and an offset of 1, DDIM exceeds its table."""
_SERIAL_GOAL = 4.0
_CEILING_STEPS = 10
"""Enough to fill all slots for a while."""
_OVERLOAD = 1.2
"""The rate of arrivals, relative to the rate of the farm."""


@dataclass
class _Cell:
    """A load of the sweep: its results, and how to measure it again."""

    ours: Callable[[], Run]
    serially: Callable[[], Run]
    farm: list[Run]
    serial: list[Run]

    @property
    def ratio(self) -> float:
        return rate(self.farm) / rate(self.serial)


class Cases:
    """The measurements of a farm and a diffusers side with the same model."""

    def __init__(
        self,
        farm: Any,
        diffusers: Any,
        side: int,
        sizes: Sequence[int],
        counts: work.Counts,
        object_store: Callable[[], AbstractContextManager[Settings]],
    ) -> None:
        """Pictures of `side` pixels squared; the sweep of loads goes over `sizes`. Checkpoints go to `object_store`."""
        self._farm, self._diffusers, self._side, self._sizes, self._counts = farm, diffusers, side, sizes, counts
        self._object_store = object_store
        self._seed = 0
        self._best = 0
        self._serial_rate: float | None = None

    def run(self, number: int) -> Row:
        """A measurement by its number in the table."""
        rows: dict[int, Callable[[], Row]] = {
            1: self._serial,
            2: self._static,
            3: self._mixed,
            4: self._denoising,
            5: self._sweep,
            6: self._urgent,
            7: self._deterministic,
            8: self._checkpoints,
        }
        return rows[number]()

    def parity(self, references: Any) -> Row:
        """Whether the farm draws diffusers' picture of one spec."""
        [spec] = self._uniform(1)
        found: Parity = references.compare(spec, self._farm.picture(spec))
        return Row(
            0,
            "the picture's largest error against diffusers in float64, in shades of 8 bits",
            255 * found.error,
            "",
            f"≤ {255 * found.tolerance:.3f}",
            found.holds,
            other=f"{255 * found.own_error:.1e}",
        )

    def ceiling(self) -> list[str]:
        """The note under the table about the first row, if measured; for a CPU."""
        if self._serial_rate is None:
            return []
        forward = self._farm.full_forward(self._uniform(self._counts.farm, steps=_CEILING_STEPS))
        product_rate = self._diffusers.product(PRODUCT_SIDE)
        return [ceiling(forward, self._counts.steps, self._serial_rate, _SERIAL_GOAL, product_rate)]

    def _serial(self) -> Row:
        self._warm(self._side)
        farm, other = self._interleaved(
            lambda: self._farm.render(self._uniform(self._counts.farm)),
            lambda: self._diffusers.render(self._uniform(self._counts.serial)),
        )
        self._serial_rate = rate(other)
        return faster(1, "farm / diffusers one by one", _SERIAL_GOAL, farm, other)

    def _static(self) -> Row:
        self._warm(self._side)
        best = self._best_batch()
        count = max(1, self._counts.farm // best) * best
        farm, other = self._interleaved(
            lambda: self._farm.render(self._uniform(count)),
            lambda: self._diffusers.render(self._uniform(count), best),
        )
        return faster(2, f"farm / diffusers in static batches of {best}", 0.97, farm, other)

    def _mixed(self) -> Row:
        count, most = self._counts.mixed, self._best_batch()
        self._farm.warm(self._mix(1))
        per_second = _OVERLOAD * self._farm.render(self._mix(count)).rate

        def both() -> tuple[Run, Run]:
            specs, arrivals = self._mix(count), work.arrivals(count, per_second, self._seed)
            return self._farm.render(specs, None, arrivals), self._diffusers.serve(specs, arrivals, most)

        pairs = [both() for _ in range(self._counts.repeats)]
        farm, other = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        together = median(run.images / run.calls for run in other)
        what = f"farm / request-level batching, mixed work at {per_second:.2f} a second ({together:.1f} a call)"
        return faster(3, what, 3.0, farm, other, latency=True)

    def _denoising(self) -> Row:
        specs = [
            # Staggered, so that requests join and leave between all steps.
            spec.model_copy(update={"num_inference_steps": max(2, self._counts.steps * (2 + place % 5) // 4)})
            for place, spec in enumerate(self._uniform(2 * self._counts.farm))
        ]
        self._farm.warm(specs[:1])
        found = [self._farm.busy(specs) for _ in range(self._counts.repeats)]
        shares = [denoising / wall for denoising, wall, _, _ in found]
        share = median(shares)
        return Row(
            4,
            f"denoiser / wall time with a full queue, {found[0][2]} requests a forward",
            share,
            "",
            "≥ 0.95",
            share >= 0.95,
            (min(shares), max(shares)),
            f"{sum(denoising for denoising, *_ in found):.1f} s of {sum(wall for _, wall, *_ in found):.1f} s",
            farm_bytes=max(run.peak_bytes for *_, run in found),
        )

    def _sweep(self) -> Row:
        few = max(2, self._counts.serial // 2)
        warmed = 0
        cells: dict[str, _Cell] = {}
        kinds = [(side, self._counts.steps) for side in self._sizes]
        for side, steps in [*((self._side, steps) for steps in self._counts.few_steps), *kinds]:
            if side != warmed:
                self._warm(side)
                warmed = side
            calls = [(partial(self._serially, side, steps), few)]
            calls += [(partial(self._loaded, side, steps, load), max(few, load)) for load in self._counts.loads]
            repeats = self._counts.repeats
            if steps < self._counts.steps:
                calls, repeats = [(call, self._enough(call, least)) for call, least in calls], self._counts.few_repeats
            bound = [partial(call, count) for call, count in calls]
            serial, *loads = self._interleaved(*bound, repeats=repeats)
            for load, call, runs in zip(self._counts.loads, bound[1:], loads, strict=True):
                kind = f"{load} at once, {side}x{side}, {steps} step{'s'[: steps > 1]}"
                cells[kind] = _Cell(call, bound[0], runs, list(serial))
                log.info("   %s: %.2f of serial", kind, cells[kind].ratio)
        for _ in range(self._counts.again):
            # The lowest of many values is low partly by chance: measure it again before the verdict.
            kind = min(cells, key=lambda kind: cells[kind].ratio)
            farm, serial = self._interleaved(cells[kind].ours, cells[kind].serially)
            cells[kind].farm += farm
            cells[kind].serial += serial
            log.info("   %s: %.2f of serial in %d pairs", kind, cells[kind].ratio, len(cells[kind].farm))
        kind = min(cells, key=lambda kind: cells[kind].ratio)
        what = f"worst farm / one by one ({kind}; {len(cells[kind].farm)} pairs)"
        return faster(5, what, 1.0, cells[kind].farm, cells[kind].serial)

    def _urgent(self) -> Row:
        bulk = self._uniform(self._counts.farm, steps=_LONG)
        others = sorted({self._side, self._sizes[1]})
        urgent = [
            spec
            for place, count in enumerate(_split(self._counts.urgent, len(others)))
            for spec in self._uniform(count, others[place], 2)
        ]
        for side in others:
            self._warm(side)
        waits, peak_bytes = self._farm.urgent(bulk, urgent)
        steps = [wait[0] for wait in waits]
        milliseconds = [1000 * wait[1] for wait in waits]
        encoded = 1000 * max(wait[2] for wait in waits)
        return Row(
            6,
            f"an urgent request's worst wait of {len(waits)}, slots full, sizes {', '.join(map(str, others))}",
            max(steps),
            " steps",
            "≤ 2",
            max(steps) <= 2,
            (min(steps), max(steps)),
            f"{median(milliseconds):.0f} ms median, {max(milliseconds):.0f} ms worst; {encoded:.0f} ms with its texts",
            farm_bytes=peak_bytes,
        )

    def _deterministic(self) -> Row:
        count = max(2, self._counts.farm // 2)
        self._farm.warm([*self._uniform(1), *self._uniform(1, deterministic=True)])
        plain, fixed = self._interleaved(
            lambda: self._farm.render(self._uniform(count)),
            lambda: self._farm.render(self._uniform(count, deterministic=True)),
        )
        return faster(7, "plain / deterministic: the price of fixed bytes", None, plain, fixed)

    def _checkpoints(self) -> Row:
        self._warm(self._side)
        every, count = self._counts.checkpoint_every, self._counts.farm
        plain: list[Run] = []
        found: list[tuple[Run, Checkpoints]] = []
        with self._object_store() as settings:
            for _ in range(self._counts.repeats):
                plain.append(self._farm.render(self._uniform(count)))
                found.append(self._farm.checkpointed(self._uniform(count), every, settings))
        runs = [run for run, _ in found]
        rounds, objects = sum(done.rounds for _, done in found), sum(done.objects for _, done in found)
        if not objects:
            raise ValueError(f"no checkpoint was made in {every} s: more work is needed")
        interval = sum(run.seconds for run in runs) / rounds
        lost = 1 - rate(runs) / rate(plain)
        each = sum(done.cpu_seconds for _, done in found) / objects
        worst = max(lost * interval, each * objects / rounds) / CHECKPOINT_SECONDS
        size = sum(done.bytes for _, done in found) / objects
        return Row(
            8,
            f"checkpoints every {CHECKPOINT_SECONDS:.0f} s, each packed, uploaded and deleted; S3 on the same cores",
            100 * worst,
            " %",
            "≤ 1 %",
            worst <= 0.01,
            None,
            f"{rate(runs):.2f} images/s with one every {interval:.2f} s ({100 * lost:.1f} % less); "
            f"{1000 * each:.1f} ms CPU each, {objects} of {size / 1024:.1f} KiB",
            f"{rate(plain):.2f} images/s without",
            max(run.peak_bytes for run in runs),
            max(run.peak_bytes for run in plain),
        )

    # --- shared

    def _enough(self, call: Callable[[int], Run], least: int) -> int:
        """The number of pictures that makes a run long enough to exceed the noise."""
        return max(least, math.ceil(call(least).rate * self._counts.few_seconds))

    def _serially(self, side: int, steps: int, count: int) -> Run:
        run: Run = self._diffusers.render(self._uniform(count, side, steps))
        return run

    def _loaded(self, side: int, steps: int, load: int, count: int) -> Run:
        run: Run = self._farm.render(self._uniform(count, side, steps), load)
        return run

    def _uniform(
        self, count: int, side: int | None = None, steps: int | None = None, *, deterministic: bool = False
    ) -> list[Any]:
        self._seed += 1
        steps = steps or self._counts.steps
        return work.uniform(count, self._seed, side=side or self._side, steps=steps, deterministic=deterministic)

    def _mix(self, count: int) -> list[Any]:
        self._seed += 1
        return work.mixed(count, self._seed, side=self._side, most_steps=self._counts.most_steps)

    def _warm(self, side: int) -> None:
        self._farm.warm(self._uniform(1, side))
        self._diffusers.render(self._uniform(1, side, 2))

    def _best_batch(self) -> int:
        if not self._best:
            rates: dict[int, float] = {}
            for _ in range(2):
                for batch in self._counts.batches:
                    rates[batch] = max(rates.get(batch, 0.0), self._diffusers.fits(self._uniform(batch)))
            log.info("   static batches, images a second: %s", " ".join(f"{n}:{rate:.2f}" for n, rate in rates.items()))
            self._best = max(rates, key=lambda batch: rates[batch])
        return self._best

    def _interleaved(self, *calls: Callable[[], Run], repeats: int | None = None) -> list[list[Run]]:
        """The runs of each side, interleaved, so that other load on the machine affects all of them."""
        turns = [[call() for call in calls] for _ in range(repeats or self._counts.repeats)]
        return [list(runs) for runs in zip(*turns, strict=True)]


def _split(count: int, parts: int) -> list[int]:
    return [count // parts + (place < count % parts) for place in range(parts)]

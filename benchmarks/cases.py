"""The eight measurements: what each compares, and the goal it is held against."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from benchmarks import work
from benchmarks.apart import Run

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 30.0
"""How often a worker writes a running request's state down, if its settings do not say otherwise."""
_LONG = 900
"""Steps of work that is not to end; with 1000 and an offset of 1 DDIM leaves its table."""
_OVERLOAD = 1.2
"""Arrivals come by so much faster than the farm renders them."""


@dataclass(frozen=True)
class Counts:
    """How much is rendered; each side is given enough work for its clock and its batches, not the same amount."""

    repeats: int = 3
    farm: int = 64
    serial: int = 6
    batches: tuple[int, ...] = (4, 8, 16, 32)
    mixed: int = 64
    loads: tuple[int, ...] = (1, 2, 4, 16)
    urgent: int = 12
    steps: int = work.STEPS
    most_steps: int = 50
    checkpoint_every: float = 0.25


QUICK = Counts(farm=16, serial=2, batches=(8, 16), mixed=8, loads=(1, 4), urgent=10, steps=10, most_steps=15)


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


class Cases:
    """The measurements over a farm and a diffusers side with the same model."""

    def __init__(self, farm: Any, diffusers: Any, side: int, sizes: Sequence[int], counts: Counts) -> None:
        """Pictures of `side` pixels squared; the sweep of loads goes over `sizes`."""
        self._farm, self._diffusers, self._side, self._sizes, self._counts = farm, diffusers, side, sizes, counts
        self._seed = 0
        self._best = 0

    def run(self, number: int) -> Row:
        """One of them by its number in the table."""
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

    def difference(self) -> int:
        """The largest difference between the two sides' pictures of one spec, in steps of 8 bits."""
        [spec] = self._uniform(1)
        pictures = zip(self._farm.picture(spec), self._diffusers.picture(spec), strict=True)
        return max((abs(ours - theirs) for ours, theirs in pictures), default=0)

    def _serial(self) -> Row:
        self._warm(self._side)
        farm, other = self._interleaved(
            lambda: self._farm.render(self._uniform(self._counts.farm)),
            lambda: self._diffusers.render(self._uniform(self._counts.serial)),
        )
        return _faster(1, "farm / diffusers one by one", 4.0, farm, other)

    def _static(self) -> Row:
        self._warm(self._side)
        best = self._best_batch()
        count = max(1, self._counts.farm // best) * best
        farm, other = self._interleaved(
            lambda: self._farm.render(self._uniform(count)),
            lambda: self._diffusers.render(self._uniform(count), best),
        )
        return _faster(2, f"farm / diffusers in static batches of {best}", 0.97, farm, other)

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
        return _faster(3, what, 3.0, farm, other, latency=True)

    def _denoising(self) -> Row:
        specs = [
            # Spread out, so that requests join and leave between all steps.
            spec.model_copy(update={"num_inference_steps": max(2, self._counts.steps * (2 + place % 5) // 4)})
            for place, spec in enumerate(self._uniform(2 * self._counts.farm))
        ]
        self._farm.warm(specs[:1])
        found = [self._farm.busy(specs) for _ in range(self._counts.repeats)]
        shares = [denoising / wall for denoising, wall, _ in found]
        share = median(shares)
        return Row(
            4,
            f"denoiser / wall time with a full queue, {found[0][2]} requests a forward",
            share,
            "",
            "≥ 0.95",
            share >= 0.95,
            (min(shares), max(shares)),
            f"{sum(denoising for denoising, _, _ in found):.1f} s of {sum(wall for _, wall, _ in found):.1f} s",
        )

    def _sweep(self) -> Row:
        worst: tuple[float, str, list[Run], list[Run]] | None = None
        few, steps = max(2, self._counts.serial // 2), self._counts.steps
        for side in self._sizes:
            self._warm(side)
            calls = [partial(self._serially, few, side, steps)]
            calls += [partial(self._loaded, max(few, load), side, steps, load) for load in self._counts.loads]
            serial, *loads = self._interleaved(*calls)
            for load, runs in zip(self._counts.loads, loads, strict=True):
                ratio = _rate(runs) / _rate(serial)
                log.info("   %dx%d, %d at once: %.2f of serial", side, side, load, ratio)
                if worst is None or ratio < worst[0]:
                    worst = ratio, f"{load} at once, {side}x{side}", runs, serial
        assert worst is not None
        return _faster(5, f"worst farm / one by one ({worst[1]})", 1.0, worst[2], worst[3])

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
        waits = self._farm.urgent(bulk, urgent)
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
        )

    def _deterministic(self) -> Row:
        count = max(2, self._counts.farm // 2)
        self._farm.warm([*self._uniform(1), *self._uniform(1, deterministic=True)])
        plain, fixed = self._interleaved(
            lambda: self._farm.render(self._uniform(count)),
            lambda: self._farm.render(self._uniform(count, deterministic=True)),
        )
        return _faster(7, "plain / deterministic: the price of fixed bytes", None, plain, fixed)

    def _checkpoints(self) -> Row:
        self._warm(self._side)
        every, count = self._counts.checkpoint_every, self._counts.farm
        plain: list[Run] = []
        packed: list[tuple[Run, int, float]] = []
        for _ in range(self._counts.repeats):
            plain.append(self._farm.render(self._uniform(count)))
            packed.append(self._farm.checkpointed(self._uniform(count), every))
        packs = sum(found[1] for found in packed)
        if not packs:
            raise ValueError(f"no checkpoint was made in {every} s: more work is needed")
        each = sum(found[2] for found in packed) / packs
        running = packs / sum(found[0].seconds for found in packed) * every
        lost = 1 - _rate([found[0] for found in packed]) / _rate(plain)
        measured, counted = lost * every / CHECKPOINT_SECONDS, running * each / CHECKPOINT_SECONDS
        worst = max(measured, counted)
        return Row(
            8,
            f"checkpoints every {CHECKPOINT_SECONDS:.0f} s (written nowhere)",
            100 * worst,
            " %",
            "≤ 1 %",
            worst <= 0.01,
            None,
            f"{100 * lost:.1f} % slower at every {every} s; {1000 * each:.2f} ms CPU a pack, {packs} packs",
            "",
            max(found[0].peak_bytes for found in packed),
        )

    # --- what they share

    def _serially(self, count: int, side: int, steps: int) -> Run:
        run: Run = self._diffusers.render(self._uniform(count, side, steps))
        return run

    def _loaded(self, count: int, side: int, steps: int, load: int) -> Run:
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

    def _interleaved(self, *calls: Callable[[], Run]) -> list[list[Run]]:
        """The runs of each, taken in turns, so that whatever else the machine does hits all of them."""
        turns = [[call() for call in calls] for _ in range(self._counts.repeats)]
        return [list(runs) for runs in zip(*turns, strict=True)]


def _faster(
    number: int, what: str, goal: float | None, farm: Sequence[Run], other: Sequence[Run], *, latency: bool = False
) -> Row:
    ratios = [ours.rate / theirs.rate for ours, theirs in zip(farm, other, strict=True)]
    ratio = _rate(farm) / _rate(other)
    shown = [f"{_rate(runs):.2f} images/s" for runs in (farm, other)]
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


def _rate(runs: Sequence[Run]) -> float:
    return median(run.rate for run in runs)


def _split(count: int, parts: int) -> list[int]:
    return [count // parts + (place < count % parts) for place in range(parts)]

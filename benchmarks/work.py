"""The work that is timed: its amount, its specs and their arrivals; equal for both sides."""

import random
from dataclasses import dataclass
from itertools import accumulate

from farm.specs.spec import RenderSpec

STEPS, GUIDANCE = 25, 5.0
SAMPLERS = ("ddim", "euler", "dpmpp_2m", "euler_a")
_SHAPES, _COLOURS = ("circle", "square", "triangle", "star"), ("red", "green", "blue", "yellow", "white")


@dataclass(frozen=True)
class Counts:
    """The amounts of work; each side gets enough for a stable time, not the same amount."""

    repeats: int = 3
    farm: int = 64
    serial: int = 6
    batches: tuple[int, ...] = (4, 8, 16, 32)
    mixed: int = 64
    loads: tuple[int, ...] = (1, 2, 4, 16)
    urgent: int = 12
    steps: int = STEPS
    most_steps: int = 50
    few_steps: tuple[int, ...] = (1, 4)
    """Few steps, which show the fixed cost of a request."""
    few_repeats: int = 7
    few_seconds: float = 0.6
    """The least time of a run of few steps."""
    again: int = 4
    """How often the sweep repeats the load with the lowest result so far."""
    checkpoint_every: float = 0.5


QUICK = Counts(
    farm=16,
    serial=2,
    batches=(8, 16),
    mixed=8,
    again=1,
    loads=(1, 4),
    urgent=10,
    steps=10,
    most_steps=15,
    few_repeats=2,
    few_seconds=0.3,
    checkpoint_every=0.25,
)


def uniform(count: int, seed: int, *, side: int, steps: int = STEPS, deterministic: bool = False) -> list[RenderSpec]:
    """Specs that differ only in prompt and seed. Another `seed` gives other, uncached prompts."""
    return [
        RenderSpec(
            prompt=_prompt(seed, place),
            seed=1000 * seed + place,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            scheduler="ddim",
            width=side,
            height=side,
            deterministic=deterministic,
        )
        for place in range(count)
    ]


def mixed(count: int, seed: int, *, side: int, most_steps: int = 50) -> list[RenderSpec]:
    """10 to 50 steps in fives, guidance 1 to 12 in ones, four samplers: round numbers, as users choose them."""
    chosen = random.Random(seed)
    return [
        spec.model_copy(
            update={
                "num_inference_steps": min(most_steps, chosen.randrange(10, 51, 5)),
                "guidance_scale": float(chosen.randint(1, 12)),
                "scheduler": chosen.choice(SAMPLERS),
            }
        )
        for spec in uniform(count, seed, side=side)
    ]


def arrivals(count: int, per_second: float, seed: int) -> list[float]:
    """The arrival times in seconds from the start: a Poisson process."""
    chosen = random.Random(seed)
    return list(accumulate(chosen.expovariate(per_second) for _ in range(count)))


def _prompt(seed: int, place: int) -> str:
    return f"a {_COLOURS[place % 5]} {_SHAPES[place % 4]} on a {_COLOURS[(place + seed) % 5]} field, {seed}.{place}"

"""What is rendered while it is timed: specs and when they come in, the same for both sides."""

import random
from itertools import accumulate

from farm.spec import RenderSpec

STEPS, GUIDANCE = 25, 5.0
SAMPLERS = ("ddim", "euler", "dpmpp_2m", "euler_a")
_SHAPES, _COLOURS = ("circle", "square", "triangle", "star"), ("red", "green", "blue", "yellow", "white")


def uniform(count: int, seed: int, *, side: int, steps: int = STEPS, deterministic: bool = False) -> list[RenderSpec]:
    """Specs that differ in prompt and seed only. Another `seed`, other prompts: nobody has their embeddings yet."""
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
    """10 to 50 steps in fives, guidance 1 to 12 in ones, four samplers: round numbers, as people choose them."""
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
    """When each comes in, in seconds from the start: a Poisson process."""
    chosen = random.Random(seed)
    return list(accumulate(chosen.expovariate(per_second) for _ in range(count)))


def _prompt(seed: int, place: int) -> str:
    return f"a {_COLOURS[place % 5]} {_SHAPES[place % 4]} on a {_COLOURS[(place + seed) % 5]} field, {seed}.{place}"

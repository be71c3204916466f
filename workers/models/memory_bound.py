"""How large a picture a device can have the memory for, told before one is tried."""

import math
from contextlib import suppress

from farm.errors import BadRequest
from farm.jobs.memory import Room
from farm.specs.spec import MAX_SIZE, MIN_SIZE, RenderSpec
from workers.render.pipeline import Pipeline

_SIDE = 64
"""Sides are tried in such steps, of which every family draws the multiples."""


def room_for(pipeline: Pipeline, total: int) -> Room | None:
    """What fits into `total` bytes beside the parameters; None if every picture may.

    Sound, but not sharp: larger ones surely do not fit, and smaller ones may not either. Raises whatever
    tracing a forward does.
    """
    room = max(1, total - pipeline.nbytes)
    side, taken = _largest(pipeline)
    if taken <= room:
        return None
    # Memory goes by the pixels, and mostly by more a pixel the fewer they are: so the guesses come down to it.
    while taken > room and (guess := _SIDE * math.ceil(side * math.sqrt(room / taken) / _SIDE)) < side:
        side, taken = guess, pipeline.forward_bytes(_square(guess))
    while taken <= room:
        side += _SIDE
        taken = pipeline.forward_bytes(_square(side))
    most = _square(side).row_pixels(side, side) - 1
    width, height = pipeline.native_size
    return Room(most, own_rows=most // (width * height))


def _largest(pipeline: Pipeline) -> tuple[int, int]:
    """The longest side that a model draws squares of, and what a forward of such a one takes."""
    for side in range(MAX_SIZE, MIN_SIZE, -_SIDE):
        with suppress(BadRequest):
            return side, pipeline.forward_bytes(_square(side))
    return MIN_SIZE, pipeline.forward_bytes(_square(MIN_SIZE))


def _square(side: int) -> RenderSpec:
    return RenderSpec(prompt="", seed=0, num_inference_steps=2, width=side, height=side)

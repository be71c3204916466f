"""Finds the largest picture that may fit into a device's memory, without rendering."""

import math
from contextlib import suppress

from farm.errors import BadRequest
from farm.jobs.served_models import MemoryLimit
from farm.specs.spec import MAX_SIZE, MIN_SIZE, RenderSpec
from workers.render.pipeline import Pipeline

_STEP = 64
"""Sides are tried in steps of this many pixels: every family draws its multiples."""


def memory_limit(pipeline: Pipeline, total_bytes: int) -> MemoryLimit | None:
    """The size limit on a device with that much memory; None if every picture may fit.

    It follows from a lower bound of a forward's memory: larger pictures do not fit, smaller ones may still not fit.
    Raises the same errors as tracing a forward.
    """
    available = max(1, total_bytes - pipeline.nbytes)
    side, taken = _largest(pipeline)
    if taken <= available:
        return None
    # A forward takes more memory per pixel the fewer pixels it has, so these guesses approach the limit from above.
    while taken > available and (guess := _STEP * math.ceil(side * math.sqrt(available / taken) / _STEP)) < side:
        side, taken = guess, pipeline.forward_bytes(_square(guess))
    while taken <= available:
        side += _STEP
        taken = pipeline.forward_bytes(_square(side))
    width, height = pipeline.native_size
    cost = side * side * pipeline.guidance.factor_of(_square(side))
    return MemoryLimit.below(cost, width * height, pipeline.guidance)


def _largest(pipeline: Pipeline) -> tuple[int, int]:
    """The side of the largest square that a model can draw, and the bytes that its forward takes."""
    for side in range(MAX_SIZE, MIN_SIZE, -_STEP):
        with suppress(BadRequest):
            return side, pipeline.forward_bytes(_square(side))
    return MIN_SIZE, pipeline.forward_bytes(_square(MIN_SIZE))


def _square(side: int) -> RenderSpec:
    return RenderSpec(prompt="", seed=0, num_inference_steps=2, width=side, height=side)

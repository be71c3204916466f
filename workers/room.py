"""How large a picture a device can have the memory for, told before one is tried."""

import logging
import math

from farm.spec import MAX_SIZE, MIN_SIZE, RenderSpec
from workers.pipelines import Pipeline

log = logging.getLogger(__name__)

_SIDE = 64
"""Sides are tried in such steps, of which every family draws the multiples."""


def most_row_pixels(pipeline: Pipeline, total: int) -> int | None:
    """Beyond so many `RenderSpec.row_pixels` no picture fits into `total` bytes beside the parameters; None if all may.

    Sound, but not sharp: larger ones surely do not fit, and smaller ones may not either.
    """
    room = max(1, total - pipeline.nbytes)
    try:
        if (most := pipeline.forward_bytes(_square(MAX_SIZE))) <= room:
            return None
        # Memory goes by the pixels, and by a little more a pixel the fewer they are: so the first guess is next to it.
        side = max(MIN_SIZE, _SIDE * math.ceil(MAX_SIZE * math.sqrt(room / most) / _SIDE))
        while pipeline.forward_bytes(_square(side)) <= room:
            side += _SIDE
    except Exception:
        log.warning("can't tell how large a picture of %s may be", pipeline.name, exc_info=True)
        return None
    return _square(side).row_pixels(side, side) - 1


def _square(side: int) -> RenderSpec:
    return RenderSpec(prompt="", seed=0, num_inference_steps=2, width=side, height=side)

"""The trajectory of a render as files: a strip of all steps, and an animation."""

import io
import math
from collections.abc import Sequence

from PIL import Image

FRAME_MILLISECONDS = 120
_STRIP_COLUMNS = 10
_STRIP_SIDE = 256
"""The longer side of a step in the strip, in pixels."""


def strip(frames: Sequence[Image.Image]) -> bytes:
    """A PNG with the pictures of all steps in order, row by row."""
    width, height = frames[0].size
    scale = min(1.0, _STRIP_SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    columns = min(_STRIP_COLUMNS, len(frames))
    page = Image.new("RGB", (columns * size[0], math.ceil(len(frames) / columns) * size[1]))
    for place, frame in enumerate(frames):
        corner = (place % columns * size[0], place // columns * size[1])
        page.paste(frame if scale == 1.0 else frame.resize(size, Image.Resampling.LANCZOS), corner)
    out = io.BytesIO()
    page.save(out, "PNG", compress_level=4)
    return out.getvalue()


def animation(frames: Sequence[Image.Image]) -> bytes:
    """A lossless animated WebP with one frame per step, in a loop."""
    out = io.BytesIO()
    frames[0].save(
        out,
        "WEBP",
        save_all=True,
        append_images=list(frames[1:]),
        duration=FRAME_MILLISECONDS,
        loop=0,
        lossless=True,
        method=2,
    )
    return out.getvalue()

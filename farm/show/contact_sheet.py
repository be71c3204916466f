"""Draws many pictures on one page, each with its prompt below it."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP, _MARGIN, _LINES = 12, 16, 2
_MOST_CHARS = 400
"""More than fit below a frame; bounds the time for measuring very long words."""
_PAPER, _INK, _FAINT = (250, 250, 248), (40, 40, 44), (225, 225, 222)


def contact_sheet(
    pictures: Sequence[tuple[Image.Image | None, str]], columns: int | None = None, cell: int | None = None
) -> Image.Image:
    """An RGB page of pictures in reading order; None leaves an empty frame.

    `cell` is the side of a frame in pixels: by default the largest picture's, between 160 and 256. Pictures are scaled
    to fit it.
    """
    count = max(1, len(pictures))
    columns = columns or min(count, max(1, round(math.sqrt(count * 4 / 3))))
    largest = max((max(image.size) for image, _ in pictures if image is not None), default=160)
    cell = cell or min(max(largest, 160), 256)
    font = ImageFont.load_default(size=max(11, cell // 13))
    line_height = math.ceil(sum(font.getmetrics())) if isinstance(font, ImageFont.FreeTypeFont) else 12
    pitch_x, pitch_y = cell + _GAP, cell + _GAP + 4 + _LINES * line_height
    rows = math.ceil(count / columns)
    page = Image.new("RGB", (2 * _MARGIN + columns * pitch_x - _GAP, 2 * _MARGIN + rows * pitch_y - _GAP), _PAPER)
    draw = ImageDraw.Draw(page)
    for place, (image, caption) in enumerate(pictures):
        left, top = _MARGIN + place % columns * pitch_x, _MARGIN + place // columns * pitch_y
        # A border of one pixel, so that a white picture has an edge.
        draw.rectangle((left - 1, top - 1, left + cell, top + cell), outline=_FAINT)
        if image is not None:
            shown = _fitted(image.convert("RGB"), cell)
            page.paste(shown, (left + (cell - shown.width) // 2, top + (cell - shown.height) // 2))
        for number, line in enumerate(_wrapped(caption, font, cell)):
            draw.text((left, top + cell + 4 + number * line_height), line, fill=_INK, font=font)
    return page


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    line = ""
    for word in text[:_MOST_CHARS].split():
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width or not line:
            line = longer
            continue
        lines.append(line)
        line = word
    lines.append(line)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], lines[_LINES - 1] + "…"]
    for number, line in enumerate(lines):
        while line and font.getlength(line) > width:
            line = line.rstrip("…")[:-1] + "…" if len(line) > 1 else ""
        lines[number] = line
    return lines

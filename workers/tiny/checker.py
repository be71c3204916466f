"""Checks whether a picture shows what its caption says, by its pixels only.

The background is the median colour along the upper and lower border; the rest is split into connected pieces. A
piece's colour is the name nearest to its inner pixels. Its shape is the template, drawn with the same area about the
same centre, that overlaps it best; its size is that template's. Attributes that the caption leaves out are not judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from workers.tiny import scenes

NOTHING_KNOWN = "?"
"""The name of an unknown shape or colour."""

_LEAST_CONTRAST = 30.0
_LEAST_AREA = 24
_LEAST_OVERLAP = 0.75
_FARTHEST_COLOUR = 44.0  # half the distance between orange and yellow, the closest pair of colours


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether each attribute of a caption is right in the picture, for all figures."""

    count: bool
    shape: bool
    colour: bool
    size: bool
    background: bool
    order: bool
    """False if the two figures are right but swapped."""

    @property
    def right(self) -> bool:
        """Whether all attributes are right."""
        return self.count and self.shape and self.colour and self.size and self.background and self.order


def check(image: Image.Image | npt.NDArray[np.uint8], caption: str) -> Verdict:
    """Judge an RGB picture of any size by its caption.

    Raises:
        ValueError: the caption is not one that `scenes.parse` understands.

    """
    said = scenes.parse(caption)
    seen = look(image)
    background = said.background in (None, seen.background)
    if len(seen.figures) != len(said.figures):
        return Verdict(count=False, shape=False, colour=False, size=False, background=background, order=False)
    pairs = list(zip(seen.figures, said.figures, strict=True))
    shape = all(ours.shape == theirs.shape for ours, theirs in pairs)
    colour = all(theirs.colour in (None, ours.colour) for ours, theirs in pairs)
    swapped = zip(seen.figures[::-1], said.figures, strict=True)
    return Verdict(
        count=True,
        shape=shape,
        colour=colour,
        size=all(theirs.size in (None, ours.size) for ours, theirs in pairs),
        background=background,
        order=(shape and colour)
        or not all(ours.shape == theirs.shape and theirs.colour in (None, ours.colour) for ours, theirs in swapped),
    )


def look(image: Image.Image | npt.NDArray[np.uint8]) -> scenes.Scene:
    """The scene in an RGB picture of any size; it may have no figure, or more than a caption can name."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    side = scenes.SIDE
    small = image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BOX)
    pixels = np.asarray(small.convert("RGB"), np.float32)
    behind = np.median(np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)]), axis=0)
    pieces, _ = ndimage.label(np.linalg.norm(pixels - behind, axis=2) > _LEAST_CONTRAST, np.ones((3, 3)))
    found: list[tuple[float, str, str, float]] = []
    for number in range(1, int(pieces.max()) + 1):
        piece = pieces == number
        if piece.sum() < _LEAST_AREA:
            continue
        inside = ndimage.binary_erosion(piece)
        colour = np.median(pixels[inside if inside.sum() >= 8 else piece], axis=0)
        # Convert antialiased edges back to the share of the pixel that the figure covers.
        along = (colour - behind) / max(1.0, float(np.sum((colour - behind) ** 2)))
        near = ndimage.binary_dilation(piece) & ((pieces == 0) | piece)
        cover = np.clip((pixels - behind) @ along, 0, 1) * near
        shape, radius = _shape(cover)
        found.append((float(ndimage.center_of_mass(cover)[1]), shape, _colour_name(colour, scenes.COLOURS), radius))
    figures = tuple(
        scenes.Figure(shape, colour, _size_name(radius, len(found))) for _, shape, colour, radius in sorted(found)
    )
    return scenes.Scene(figures, _colour_name(behind, tuple(scenes.PALETTE)))


def _shape(cover: npt.NDArray[np.float32]) -> tuple[str, float]:
    """The best overlapping shape and its radius."""
    area = float(cover.sum())
    y, x = ndimage.center_of_mass(cover)
    best, best_overlap, best_radius = NOTHING_KNOWN, _LEAST_OVERLAP, math.sqrt(area / math.pi)
    for shape in scenes.SHAPES:
        unit_area, drop = _moments(shape)
        radius = math.sqrt(area / unit_area)
        template = scenes.mask(shape, radius, x + 0.5, y + 0.5 - drop * radius)
        overlap = float(np.minimum(cover, template).sum() / np.maximum(cover, template).sum())
        if overlap > best_overlap:
            best, best_overlap, best_radius = shape, overlap, radius
    return best, best_radius


@cache
def _moments(shape: str) -> tuple[float, float]:
    """A shape's area at radius 1, and the distance of its centre of mass below its middle."""
    radius, middle = 100.0, 128.0
    drawn = scenes.mask(shape, radius, middle, middle, side=256)
    return float(drawn.sum()) / radius**2, (float(ndimage.center_of_mass(drawn)[0]) + 0.5 - middle) / radius


def _colour_name(colour: npt.NDArray[np.float32], names: tuple[str, ...]) -> str:
    distance = {name: float(np.linalg.norm(colour - np.asarray(scenes.PALETTE[name]))) for name in names}
    nearest = min(distance, key=distance.__getitem__)
    return nearest if distance[nearest] < _FARTHEST_COLOUR else NOTHING_KNOWN


def _size_name(radius: float, figures: int) -> str:
    """The size word of the nearest radius, in a scene with that many figures."""
    return min(scenes.SIZES, key=lambda size: abs(scenes.RADII[min(figures, 2), size] - radius))

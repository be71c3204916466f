"""Scenes that the tiny model can draw, their pictures and their captions.

A scene is one figure, or two side by side, on a plain background. `draw` turns a scene into 64x64 pixels, `caption`
puts it into words in one of many wordings, and `parse` reads such words back. Everything random comes from the
given `random.Random`, so the same seed gives the same scene, picture and words.

Held out: `held_out` picks about a tenth of all (shape, colour, background) triples by a hash of their names.
`random_scene` never puts a figure of a held-out triple into a scene, whether or not the caption would say so;
every figure in `held_out_captions` is such a triple, with its colour and background in the text.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SIDE = 64
"""Width and height of a picture, in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (217, 38, 38),
    "orange": (247, 134, 22),
    "yellow": (252, 218, 46),
    "green": (38, 155, 70),
    "blue": (36, 92, 214),
    "purple": (134, 48, 168),
    "pink": (248, 156, 196),
    "white": (250, 250, 250),
    "black": (16, 16, 18),
    "grey": (128, 130, 134),
}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black")
BACKGROUNDS = ("white", "black", "grey", "blue", "green", "pink")

RADII: dict[tuple[int, str], float] = {(1, "small"): 12.5, (1, "big"): 22.5, (2, "small"): 9.5, (2, "big"): 13.5}
"""Half the width of a figure in pixels, by number of figures and size word."""
SIZES = ("small", "big")

_OTHER_WORDS = {
    "circle": ("disc",),
    "square": ("box",),
    "purple": ("violet",),
    "grey": ("gray",),
    "small": ("little", "tiny"),
    "big": ("large", "large"),
}
_MEANING = {word: word for word in (*SHAPES, *PALETTE, *SIZES)} | {
    other: word for word, others in _OTHER_WORDS.items() for other in others
}
_SUPERSAMPLING = 4


@dataclass(frozen=True, slots=True)
class Figure:
    """One shape of one colour; None if a caption leaves it out."""

    shape: str
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """One figure or two, from left to right, on a background; None if a caption leaves it out."""

    figures: tuple[Figure, ...]
    background: str | None = None

    def agrees_with(self, said: Scene) -> bool:
        """Whether everything in `said` is true of this scene."""
        return (
            len(self.figures) == len(said.figures)
            and said.background in (None, self.background)
            and all(
                theirs.shape == ours.shape and theirs.colour in (None, ours.colour) and theirs.size in (None, ours.size)
                for ours, theirs in zip(self.figures, said.figures, strict=True)
            )
        )


@cache
def held_out(shape: str, colour: str, background: str) -> bool:
    """Whether a figure of this shape and colour on this background is excluded from training."""
    return hashlib.sha256(f"{shape}/{colour}/{background}".encode()).digest()[0] % 10 == 0


def random_scene(rng: random.Random) -> Scene:
    """A complete scene of the training set: a single figure in two of five cases, else two."""
    background = rng.choice(BACKGROUNDS)
    figures: list[Figure] = []
    wanted = 1 if rng.random() < 0.4 else 2
    while len(figures) < wanted:
        figure = Figure(rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(SIZES))
        if figure.colour != background and not held_out(figure.shape, figure.colour or "", background):
            figures.append(figure)
    return Scene(tuple(figures), background)


def held_out_captions(n: int, seed: int = 0) -> list[str]:
    """`n` captions, half of one figure and half of two, with held-out figures only.

    Each names colours and background; two in five name a size.
    """
    rng = random.Random(f"held-out {seed}")
    triples = {
        background: [
            (shape, colour)
            for shape in SHAPES
            for colour in COLOURS
            if colour != background and held_out(shape, colour, background)
        ]
        for background in BACKGROUNDS
    }
    captions = []
    for i in range(n):
        background = rng.choice(BACKGROUNDS)
        figures = tuple(
            Figure(shape, colour, rng.choice(SIZES) if rng.random() < 0.4 else None)
            for shape, colour in (rng.choice(triples[background]) for _ in range(1 + i % 2))
        )
        captions.append(_in_words(Scene(figures, background), rng))
    return captions


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the scene's wordings; it may leave out sizes, the background and sometimes a colour."""
    figures = tuple(
        replace(
            figure,
            size=figure.size if rng.random() < 0.4 else None,
            colour=figure.colour if rng.random() < 0.96 else None,
        )
        for figure in scene.figures
    )
    return _in_words(Scene(figures, scene.background if rng.random() < 0.75 else None), rng)


def parse(text: str) -> Scene:
    """The scene of a caption, figures from left to right: in the order named, unless it says otherwise.

    Raises:
        ValueError: the text names no shape, or more than two.

    """
    figures: list[Figure] = []
    colour = size = background = side = None
    for word in [*re.findall(r"[a-z]+|[,.;:]", text.lower()), "."]:
        meaning = _MEANING.get(word, word)
        if meaning in SHAPES:
            figures.append(Figure(meaning, colour, size))
            colour = size = None
        elif meaning in PALETTE:
            colour = meaning
        elif meaning in SIZES:
            size = meaning
        elif word in ("left", "right"):
            side = side or word
        elif (word == "background" or not word.isalpha()) and colour is not None:
            background, colour = colour, None
    if not 1 <= len(figures) <= 2:
        raise ValueError(f"expected one shape or two of {', '.join(SHAPES)} in {text!r}, found {len(figures)}")
    if side == "right":
        figures.reverse()
    return Scene(tuple(figures), background)


def draw(scene: Scene, rng: random.Random) -> npt.NDArray[np.uint8]:
    """The scene as pixels, `(64, 64, 3)` RGB; `rng` varies positions and sizes a little.

    A missing size is drawn at random; colours and background are required.

    Raises:
        KeyError: a colour or the background is missing.

    """
    pixels = np.empty((SIDE, SIDE, 3), np.float32)
    pixels[:] = PALETTE[scene.background or ""]
    count = len(scene.figures)
    for i, figure in enumerate(scene.figures):
        radius = RADII[count, figure.size or rng.choice(SIZES)] * rng.uniform(0.95, 1.05)
        room = max(0.0, min(SIDE / (2 * count) - 1.5 - radius, 5.0))
        x = SIDE * (2 * i + 1) / (2 * count) + rng.uniform(-room, room)
        y = SIDE / 2 + rng.uniform(-5, 5)
        cover = mask(figure.shape, radius, x, y)[..., None]
        pixels += cover * (np.asarray(PALETTE[figure.colour or ""], np.float32) - pixels)
    return pixels.round().astype(np.uint8)


def mask(shape: str, radius: float, x: float, y: float, side: int = SIDE) -> npt.NDArray[np.float32]:
    """The share of each pixel that a shape covers, `(side, side)`, antialiased by drawing it four times as large."""
    k = _SUPERSAMPLING
    picture = Image.new("L", (side * k, side * k))
    pen = ImageDraw.Draw(picture)
    for outline, ink in _OUTLINES[shape]:
        pen.polygon([((x + radius * u) * k - 0.5, (y + radius * v) * k - 0.5) for u, v in outline], fill=ink)
    return np.asarray(picture.reduce(k), np.float32) / np.float32(255)


_Outline = tuple[tuple[float, float], ...]


def _turn(count: int, *radii: float) -> _Outline:
    """`count` points around the centre from the top on, at radii taken in turn."""
    return tuple(
        (radii[i % len(radii)] * math.sin(angle), -radii[i % len(radii)] * math.cos(angle))
        for i, angle in enumerate(2 * math.pi * i / count for i in range(count))
    )


def _heart(count: int = 60) -> _Outline:
    turns = [2 * math.pi * i / count for i in range(count)]
    return tuple(
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5) / 16,
        )
        for t in turns
    )


_CROSS = ((1, 0.34), (0.34, 0.34), (0.34, 1), (-0.34, 1), (-0.34, 0.34), (-1, 0.34))
_OUTLINES: dict[str, tuple[tuple[_Outline, int], ...]] = {
    "circle": ((_turn(72, 1.0), 255),),
    "square": ((((-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)), 255),),
    "triangle": ((((0, -0.95), (1, 0.82), (-1, 0.82)), 255),),
    "star": ((_turn(10, 1.06, 0.45), 255),),
    "heart": ((_heart(), 255),),
    "cross": ((tuple((float(u), float(v)) for u, v in (*_CROSS, *((-u, -v) for u, v in _CROSS))), 255),),
    "ring": ((_turn(72, 1.0), 255), (_turn(72, 0.52), 0)),
    "diamond": ((((0, -1.05), (0.76, 0), (0, 1.05), (-0.76, 0)), 255),),
}


def _in_words(scene: Scene, rng: random.Random) -> str:
    """A caption that names everything in the scene that is not None."""

    def word(meaning: str) -> str:
        return rng.choice(_OTHER_WORDS[meaning]) if meaning in _OTHER_WORDS and rng.random() < 0.2 else meaning

    def phrase(figure: Figure, article: bool) -> str:
        words = [word(w) for w in (figure.size, figure.colour, figure.shape) if w is not None]
        if article:
            words.insert(0, "an" if words[0][0] in "aeiou" else "a")
        return " ".join(words)

    article = rng.random() < 0.85
    phrases = [phrase(figure, article) for figure in scene.figures]
    if len(phrases) == 1:
        text = phrases[0]
    else:
        left, right = phrases
        text = rng.choice(
            (
                f"{left} and {right}",
                f"{left} next to {right}",
                f"{left} left of {right}",
                f"{left} to the left of {right}",
                f"{right} right of {left}",
                f"{right} to the right of {left}",
                f"{left} on the left and {right} on the right",
                f"{right} on the right, {left} on the left",
            )
        )
    if article and rng.random() < 0.1:
        text = rng.choice(("a picture of ", "a drawing of ")) + text
    if scene.background is not None:
        behind = word(scene.background)
        text += rng.choice(
            (f" on a {behind} background", f" on a {behind} background", f", {behind} background", f" on {behind}")
        )
    return text

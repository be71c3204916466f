"""Measures how often the tiny model draws what a caption says.

    python -m workers.tiny.evaluate --n 300 --steps 25 --guidance 5

Renders captions of held-out combinations with diffusers' own pipeline, and judges the pictures with the checker.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import diffusers
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from workers.tiny import WEIGHTS, scenes
from workers.tiny.checker import Verdict, check


def load(folder: Path = WEIGHTS) -> diffusers.StableDiffusionPipeline:
    """The checkpoint as diffusers' pipeline in float32 on the CPU, without its progress bar."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def render(
    pipeline: diffusers.StableDiffusionPipeline, captions: Sequence[str], *, steps: int, guidance: float, seed: int = 0
) -> list[Image.Image]:
    """One 64x64 picture per caption; picture `i` starts from the noise of seed `seed + i`."""
    images: list[Image.Image] = pipeline(
        list(captions),
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=scenes.SIDE,
        width=scenes.SIDE,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(captions))],
    ).images
    return images


def render_all(
    pipeline: diffusers.StableDiffusionPipeline,
    captions: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seed: int = 0,
    batch: int = 25,
) -> Iterator[Image.Image]:
    """The same for any number of captions, `batch` of them at a time."""
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        yield from render(pipeline, part, steps=steps, guidance=guidance, seed=seed + start)


def main(arguments: Sequence[str] | None = None) -> None:
    """Render, judge, and print the share of captions right on each attribute."""
    parser = argparse.ArgumentParser(prog="python -m workers.tiny.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=300, help="Number of held-out captions (default: %(default)s).")
    parser.add_argument("--steps", type=int, default=25, help="Number of denoising steps (default: %(default)s).")
    parser.add_argument("--guidance", type=float, default=5.0, help="Guidance scale (default: %(default)s).")
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of the captions and of the noise (default: %(default)s)."
    )
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, help="Folder of the checkpoint (default: the one that ships)."
    )
    parser.add_argument("--wrong", type=Path, help="Folder to save the pictures in that are not right.")
    options = parser.parse_args(arguments)

    console = Console()
    captions = scenes.held_out_captions(options.n, options.seed)
    images = render_all(
        load(options.weights), captions, steps=options.steps, guidance=options.guidance, seed=options.seed
    )
    verdicts: list[Verdict] = []
    for caption, image in zip(captions, track(images, "rendering", len(captions), console=console), strict=True):
        verdicts.append(check(image, caption))
        if options.wrong and not verdicts[-1].right:
            options.wrong.mkdir(parents=True, exist_ok=True)
            image.save(options.wrong / f"{caption}.png")
    table = Table("attribute", "right", title=f"{options.steps} steps, guidance {options.guidance:g}")
    for attribute in (*(field.name for field in fields(Verdict)), "right"):
        share = sum(getattr(verdict, attribute) for verdict in verdicts) / len(verdicts)
        table.add_row("everything" if attribute == "right" else attribute, f"{share:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()

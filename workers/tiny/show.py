"""Draws the noising and the denoising of a picture.

    python -m workers.tiny.show "a red heart left of a yellow star on a blue background"

Writes two strips of pictures: forward, a drawn scene's latents with more and more noise; and backward, the latents
after each denoising step. The image decoder makes every picture from latents.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from workers.tiny import WEIGHTS, autoencoder, scenes
from workers.tiny.denoiser import add_noise
from workers.tiny.evaluate import load

_GAP = 2


def noising_strip(
    pipeline: diffusers.StableDiffusionPipeline, scene: scenes.Scene, *, frames: int = 9, seed: int = 0
) -> Image.Image:
    """A drawn scene, then its latents with noise up to timesteps spread evenly over all 1000."""
    noise_scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    picture = scenes.draw(scene, random.Random(seed))
    latents = autoencoder.encode(pipeline.vae, picture[None]) * pipeline.vae.config.scaling_factor
    timesteps = torch.linspace(0, len(noise_scheduler.alphas_cumprod) - 1, frames).long()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).expand(frames, -1, -1, -1)
    noisy = add_noise(latents.expand(frames, -1, -1, -1), noise, timesteps, noise_scheduler.alphas_cumprod)
    return side_by_side([Image.fromarray(picture), *decode(pipeline, noisy)])


def denoising_strip(
    pipeline: diffusers.StableDiffusionPipeline,
    caption: str,
    *,
    steps: int = 25,
    frames: int | None = None,
    guidance: float = 5.0,
    seed: int = 0,
) -> Image.Image:
    """The latents after each denoising step; `frames` of them, evenly spread, if that is given."""
    seen: list[Tensor] = []

    def note(_: diffusers.StableDiffusionPipeline, __: int, ___: int, held: dict[str, Any]) -> dict[str, Any]:
        seen.append(held["latents"].clone())
        return {}

    pipeline(
        caption,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=scenes.SIDE,
        width=scenes.SIDE,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=note,
        output_type="latent",
    )
    chosen = np.linspace(0, len(seen) - 1, min(frames or len(seen), len(seen))).round().astype(int)
    return side_by_side(decode(pipeline, torch.cat([seen[i] for i in chosen])))


@torch.no_grad()
def decode(pipeline: diffusers.StableDiffusionPipeline, latents: Tensor) -> list[Image.Image]:
    """The pictures of latents `(n, 4, h, w)`, scaled as the UNet gets them."""
    drawn = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    images: list[Image.Image] = pipeline.image_processor.postprocess(drawn, output_type="pil")
    return images


def side_by_side(images: Sequence[Image.Image], scale: int = 2) -> Image.Image:
    """Pictures of one size in a row, with a thin white gap between them."""
    width, height = images[0].width * scale, images[0].height * scale
    strip = Image.new("RGB", (len(images) * (width + _GAP) - _GAP, height), "white")
    for i, image in enumerate(images):
        strip.paste(image.resize((width, height), Image.Resampling.NEAREST), (i * (width + _GAP), 0))
    return strip


def main(arguments: Sequence[str] | None = None) -> None:
    """Write `noising.png` and `denoising.png`."""
    parser = argparse.ArgumentParser(prog="python -m workers.tiny.show", description=__doc__.split("\n")[0])
    parser.add_argument(
        "caption",
        nargs="?",
        default="a red heart left of a yellow star on a blue background",
        help="Caption of the picture, in the words that the model knows (default: %(default)s).",
    )
    parser.add_argument("--steps", type=int, default=25, help="Number of denoising steps (default: %(default)s).")
    parser.add_argument("--frames", type=int, help="Number of steps to show; all if omitted.")
    parser.add_argument("--guidance", type=float, default=5.0, help="Guidance scale (default: %(default)s).")
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of the scene and of the noise (default: %(default)s)."
    )
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, help="Folder of the checkpoint (default: the one that ships)."
    )
    parser.add_argument(
        "--out", type=Path, default=Path(), help="Folder for the two pictures (default: the current one)."
    )
    options = parser.parse_args(arguments)

    pipeline = load(options.weights)
    options.out.mkdir(parents=True, exist_ok=True)
    scene = _filled_in(options.caption, options.seed)
    noising_strip(pipeline, scene, seed=options.seed).save(options.out / "noising.png")
    denoising_strip(
        pipeline,
        options.caption,
        steps=options.steps,
        frames=options.frames,
        guidance=options.guidance,
        seed=options.seed,
    ).save(options.out / "denoising.png")
    print(f"{options.out / 'noising.png'} and {options.out / 'denoising.png'} are written")


def _filled_in(caption: str, seed: int) -> scenes.Scene:
    """The scene of a caption, completed from a random scene."""
    said, rng = scenes.parse(caption), random.Random(seed)
    while True:
        other = scenes.random_scene(rng)
        background = said.background or other.background
        figures = tuple(
            scenes.Figure(f.shape, f.colour or rng.choice(scenes.COLOURS), f.size or rng.choice(scenes.SIZES))
            for f in said.figures
        )
        if all(figure.colour != background for figure in figures):
            return scenes.Scene(figures, background)


if __name__ == "__main__":
    main()

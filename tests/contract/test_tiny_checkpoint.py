"""The packaged model loads in diffusers, is small, and draws what its prompt says."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from workers.tiny import WEIGHTS, scenes, show
from workers.tiny.checker import check
from workers.tiny.evaluate import load, render

SIX = [
    "a red circle on a white background",
    "a small blue star, black background",
    "a green heart left of a yellow ring on a grey background",
    "an orange cross to the right of a purple diamond on white",
    "a white triangle and a black square on a pink background",
    "a big yellow star on blue",
]


@pytest.fixture(scope="module")
def pipeline():
    return load()


def test_the_checkpoint_is_small_enough_to_ship():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= 16e6
    assert not [file for file in WEIGHTS.rglob("*") if file.suffix in {".bin", ".pt", ".pkl"}]


def test_it_is_a_stable_diffusion_in_miniature(pipeline):
    names = json.loads((WEIGHTS / "model_index.json").read_text())
    assert names["_class_name"] == "StableDiffusionPipeline"
    assert [type(part).__name__ for part in (pipeline.text_encoder, pipeline.unet, pipeline.vae)] == [
        "CLIPTextModel",
        "UNet2DConditionModel",
        "AutoencoderKL",
    ]
    assert pipeline.tokenizer.model_max_length == 77
    assert pipeline.vae_scale_factor == 8
    assert pipeline.unet.dtype == torch.float32


def test_it_draws_held_out_captions_right(pipeline):
    captions = [*scenes.held_out_captions(18, seed=5), *SIX]
    images = render(pipeline, captions, steps=20, guidance=5.0)
    right = [check(image, words).right for image, words in zip(images, captions, strict=True)]
    assert np.mean(right) >= 0.9, [words for words, ok in zip(captions, right, strict=True) if not ok]


def test_an_empty_prompt_draws_some_scene(pipeline):
    (image,) = render(pipeline, [""], steps=20, guidance=5.0)
    assert np.asarray(image).std() > 10


def test_the_strips_show_noise_coming_and_going(pipeline):
    noising = show.noising_strip(pipeline, scenes.parse("a big red heart on a white background"), frames=4)
    denoising = show.denoising_strip(pipeline, "a red heart on a white background", steps=12, frames=5)
    assert noising.width == denoising.width
    last = denoising.crop((denoising.width - 128, 0, denoising.width, 128)).resize((64, 64), Image.Resampling.NEAREST)
    first = noising.crop((0, 0, 128, 128))
    assert check(last, "a red heart on a white background").right
    assert check(first, "a big red heart on a white background").right

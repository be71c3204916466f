"""The family that `docs/pipelines.md` writes is all that is needed: its pictures are diffusers' own."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from PIL import Image

from farm.specs.spec import RenderSpec
from tests.checkpoints import t5_encoder, t5_tokenizer
from workers import pipelines
from workers.engine.engine import Engine
from workers.models.pins import Pins
from workers.render.request import RenderRequest

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
_HALF_A_SHADE = 1.01
"""Of 8 bits, after rounding on both sides: a picture of equal floats but for their last bits."""


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's file among the families."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "pixart_sigma.py").write_text(code)
    monkeypatch.setattr(pipelines, "__path__", [*pipelines.__path__, str(tmp_path)])
    pipelines.families.cache_clear()
    yield
    pipelines.families.cache_clear()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A narrow PixArt-Sigma with random weights, which draws 64x64 pictures."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = PixArtTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
            use_additional_conditions=False,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=8,
            scaling_factor=0.13025,
        )
        scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
        pipe = PixArtSigmaPipeline(t5_tokenizer(), t5_encoder(32), vae, transformer, scheduler)
    pipe.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.usefixtures("family")
def test_the_family_of_the_page_draws_what_diffusers_draws_in_shared_forwards(checkpoint: Path) -> None:
    texts = [("a red circle", ""), ("two cats", "blurry"), ("", "low"), ("an old house " * 9, "")]
    specs = [
        RenderSpec(prompt=text, negative_prompt=negative, seed=seed, num_inference_steps=4 + seed, guidance_scale=scale)
        for seed, (text, negative) in enumerate(texts)
        for scale in (1.0, 4.5)
    ]
    pipeline = pipelines.load(str(checkpoint), torch.device("cpu"), torch.float32)
    engine = Engine(Pins.of({"tiny": pipeline}), slots=4, line=len(specs))
    engine.start()
    futures = [engine.submit(RenderRequest(str(place), spec)) for place, spec in enumerate(specs)]
    pictures = [np.asarray(future.result(timeout=120).image) for future in futures]
    engine.stop()

    theirs = PixArtSigmaPipeline.from_pretrained(checkpoint)
    theirs.set_progress_bar_config(disable=True)
    for spec, picture in zip(specs, pictures, strict=True):
        (expected,) = theirs(
            prompt=spec.prompt,
            negative_prompt=spec.negative_prompt,
            num_inference_steps=spec.num_inference_steps,
            guidance_scale=spec.guidance_scale,
            width=64,
            height=64,
            generator=torch.Generator("cpu").manual_seed(spec.seed),
            use_resolution_binning=False,
            clean_caption=False,
        ).images
        assert isinstance(expected, Image.Image)
        off = np.abs(picture.astype(float) - np.asarray(expected).astype(float)).max()
        assert off <= _HALF_A_SHADE, f"{spec.prompt!r} at {spec.guidance_scale}: {off:g} shades off"


def test_every_command_of_the_page_selects_tests_that_are_there() -> None:
    chosen = re.findall(r'make test ARGS="-k (\w+)"', PAGE.read_text())
    names = {path.stem for path in (PAGE.parents[1] / "tests").rglob("test_*.py")}
    assert chosen
    assert all(any(word in name for name in names) for word in chosen)

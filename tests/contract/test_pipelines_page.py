"""The family that `docs/pipelines.md` writes works as shown, and draws the same pictures as diffusers."""

import re
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch

from benchmarks.parity import Parity, References
from farm.errors import BadRequest
from farm.specs.spec import RenderSpec
from tests.checkpoints import t5_encoder, t5_tokenizer
from tests.parity import draw
from workers import pipelines
from workers.render.request import RenderRequest

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install the page's file as a family."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "pixart_sigma.py").write_text(code)
    monkeypatch.setattr(pipelines, "__path__", [*pipelines.__path__, str(tmp_path)])
    pipelines.families.cache_clear()
    yield
    pipelines.families.cache_clear()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Write a narrow PixArt-Sigma with random weights, which draws 64x64 pictures."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = diffusers.PixArtTransformer2DModel(
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
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=8,
            scaling_factor=0.13025,
        )
        scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
        pipe = diffusers.PixArtSigmaPipeline(t5_tokenizer(), t5_encoder(32), vae, transformer, scheduler)
    pipe.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.usefixtures("family")
def test_the_family_of_the_page_draws_what_diffusers_draws_in_shared_forwards(checkpoint: Path) -> None:
    texts = [("a red circle", ""), ("two cats", "blurry"), ("", "low"), ("an old house " * 9, "")]
    specs = [
        RenderSpec(
            prompt=text,
            negative_prompt=negative,
            seed=seed,
            num_inference_steps=4 + seed,
            guidance_scale=scale,
            width=64,
            height=64,
        )
        for seed, (text, negative) in enumerate(texts)
        for scale in (1.0, 4.5)
    ]
    pictures = draw(pipelines.load(str(checkpoint), torch.device("cpu"), torch.float32), specs, slots=4)
    theirs = References(checkpoint, use_resolution_binning=False, clean_caption=False)
    parity = Parity.of(pictures, [theirs.of(spec) for spec in specs])
    assert parity.holds, parity


@pytest.mark.usefixtures("family")
def test_the_family_of_the_page_loads_with_compile_on_and_says_that_nothing_was_compiled(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = pipelines.load(str(checkpoint), torch.device("cpu"), torch.float32, compile=True)
    assert not pipeline.compiled
    assert "not compiled: diffusers names no repeated blocks in PixArtTransformer2DModel" in caplog.messages


@pytest.mark.usefixtures("family")
def test_the_family_of_the_page_refuses_a_text_option_that_it_does_not_take(checkpoint: Path) -> None:
    pipeline = pipelines.load(str(checkpoint), torch.device("cpu"), torch.float32)
    request = RenderRequest("a", RenderSpec(prompt="x", seed=1, clip_skip=1))
    with pytest.raises(BadRequest, match="has no clip_skip: a PixArtSigmaPipeline does not take it"):
        pipeline.plan(request)


def test_every_command_of_the_page_selects_tests_that_are_there() -> None:
    chosen = re.findall(r'make test ARGS="-k (\w+)"', PAGE.read_text())
    names = {path.stem for path in (PAGE.parents[1] / "tests").rglob("test_*.py")}
    assert chosen
    assert all(any(word in name for name in names) for word in chosen)

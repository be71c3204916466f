"""What `StableDiffusion` does beyond drawing diffusers' picture, for which see `tests/contract/test_parity.py`."""

from pathlib import Path

import pytest
import torch

from farm.errors import BadRequest, ModelError
from farm.spec import RenderSpec
from tests.checkpoints import build_checkpoint
from workers.pipelines import Pipeline, load
from workers.request import RenderRequest

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return load(str(folder), CPU, torch.float32)


@torch.inference_mode()
def draw(pipeline: Pipeline, request: RenderRequest) -> torch.Tensor:
    pipeline.encode(request)
    while not request.denoised:
        (output,) = pipeline.denoise([request])
        pipeline.step(request, output)
        request.step_index += 1
    return pipeline.decode([request])


def encoded(pipeline: Pipeline, **spec: object) -> RenderRequest:
    request = RenderRequest("a", RenderSpec.parse({"prompt": "x", "scheduler": "ddim", **spec}))
    with torch.inference_mode():
        pipeline.encode(request)
    return request


def test_a_text_too_long_is_a_warning_and_never_silent(pipeline: Pipeline) -> None:
    assert encoded(pipeline, prompt="x" * 80, negative_prompt="y" * 90).warnings == [
        "the prompt was cut at 77 tokens; left out: xxxxx",
        "the negative prompt was cut at 77 tokens; left out: yyyyyyyyyyyyyyy",
    ]
    assert encoded(pipeline, prompt="x" * 75).warnings == []
    assert encoded(pipeline, negative_prompt="y" * 90, guidance_scale=1).warnings == []


@pytest.mark.parametrize(("guidance_scale", "rows"), [(0, 1), (1, 1), (1.01, 2), (7.5, 2)])
def test_only_guidance_costs_a_second_row(pipeline: Pipeline, guidance_scale: float, rows: int) -> None:
    conditioning = encoded(pipeline, guidance_scale=guidance_scale).conditioning
    assert conditioning["encoder_hidden_states"].shape == (rows, 77, 32)


def test_latents_stay_in_float32_whatever_the_models_precision(folder: Path, pipeline: Pipeline) -> None:
    half = load(str(folder), CPU, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.nbytes == pipeline.nbytes // 2
    spec = RenderSpec(prompt="a cat", num_inference_steps=4, seed=1, scheduler="euler_a", guidance_scale=2)
    request = RenderRequest("a", spec)
    picture = draw(half, request)
    assert (request.latents.dtype, picture.dtype) == (torch.float32, torch.float32)
    assert 0 < (picture - draw(pipeline, RenderRequest("a", spec))).abs().mean() < 0.02


def test_the_native_size_is_that_of_the_checkpoint(pipeline: Pipeline) -> None:
    assert pipeline.native_size == (64, 64)
    assert pipeline.latent_shape(RenderSpec(prompt="x")) == (4, 8, 8)
    assert pipeline.latent_shape(RenderSpec(prompt="x", width=128)) == (4, 8, 16)


def test_a_sampler_the_checkpoints_config_forbids_is_a_bad_request(tmp_path: Path) -> None:
    pipeline = load(str(build_checkpoint(tmp_path, use_exponential_sigmas=True)), CPU, torch.float32)
    with pytest.raises(BadRequest, match="EulerDiscreteScheduler: Only one of"):
        encoded(pipeline, scheduler="euler_karras")


def test_weights_that_can_not_be_read_are_a_model_error(tmp_path: Path) -> None:
    weights = build_checkpoint(tmp_path) / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="can't be loaded"):
        load(str(tmp_path), CPU, torch.float32)

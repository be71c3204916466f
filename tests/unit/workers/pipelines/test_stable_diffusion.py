"""`DiffusersPipeline`'s features beyond parity with diffusers, which `tests/contract/test_parity.py` checks."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as nn

from benchmarks.parity import Parity, Reference
from farm.errors import BadRequest, ModelError
from farm.specs.spec import RenderSpec
from tests.checkpoints import build_checkpoint
from workers.pipelines import load
from workers.render.request import RenderRequest
from workers.tiny import WEIGHTS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def pipeline(folder: Path) -> Any:
    return load(str(folder), CPU, torch.float32)


@torch.inference_mode()
def encoded(pipeline: Any, **spec: object) -> RenderRequest:
    request = RenderRequest("a", RenderSpec.parse({"prompt": "x", "scheduler": "ddim", "seed": 1, **spec}))
    pipeline.plan(request)
    pipeline.encode(request)
    return request


@torch.inference_mode()
def denoised(pipeline: Any, **spec: object) -> RenderRequest:
    request = encoded(pipeline, **spec)
    while not request.denoised:
        pipeline.step([request], pipeline.denoise([request]))
        request.step_index += 1
    return request


def test_a_text_too_long_is_a_warning_and_never_silent(pipeline: Any) -> None:
    assert encoded(pipeline, prompt="x" * 80, negative_prompt="y" * 90).warnings == [
        "the negative prompt was cut at 77 tokens; left out: yyyyyyyyyyyyyyy",
        "the prompt was cut at 77 tokens; left out: xxxxx",
    ]
    assert encoded(pipeline, prompt="x" * 75).warnings == []
    assert encoded(pipeline, negative_prompt="y" * 90, guidance_scale=1).warnings == []


@pytest.mark.parametrize(("guidance_scale", "rows"), [(0, 1), (1, 1), (1.01, 2), (7.5, 2)])
def test_only_guidance_costs_a_second_row(pipeline: Any, guidance_scale: float, rows: int) -> None:
    request = encoded(pipeline, guidance_scale=guidance_scale)
    assert request.rows == rows
    assert request.conditioning["encoder_hidden_states"].shape == (rows, 77, 32)


def test_latents_stay_in_float32_whatever_the_models_precision(folder: Path, pipeline: Any) -> None:
    half = load(str(folder), CPU, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.nbytes == pipeline.nbytes // 2
    spec = {"num_inference_steps": 4, "scheduler": "euler_a", "guidance_scale": 2}
    requests = [denoised(half, **spec), denoised(pipeline, **spec)]
    with torch.inference_mode():
        pictures = [half.decode(requests[0].latents), pipeline.decode(requests[1].latents)]
    assert (requests[0].latents.dtype, pictures[0].dtype) == (torch.float32, torch.float32)
    assert 0 < (pictures[0] - pictures[1]).abs().mean() < 0.02


def test_the_native_size_is_that_of_the_checkpoint(pipeline: Any) -> None:
    assert pipeline.native_size == (64, 64)
    assert encoded(pipeline).latents.shape == (1, 4, 8, 8)
    assert encoded(pipeline, width=128).latents.shape == (1, 4, 8, 16)


def test_more_layers_than_the_text_encoder_has_can_not_be_skipped(pipeline: Any) -> None:
    with pytest.raises(BadRequest, match="can't skip 2 of its text encoder's 2 layers"):
        encoded(pipeline, clip_skip=2)


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_a_sampler_of_another_kind_of_model_is_a_bad_request(pipeline: Any, scheduler: str) -> None:
    with pytest.raises(BadRequest, match=f"StableDiffusionPipeline.*can't be sampled with '{scheduler}'"):
        pipeline.plan(RenderRequest("a", RenderSpec(prompt="x").model_copy(update={"scheduler": scheduler})))


def test_a_sampler_the_checkpoints_config_forbids_is_a_bad_request(tmp_path: Path) -> None:
    pipeline = load(str(build_checkpoint(tmp_path, use_exponential_sigmas=True)), CPU, torch.float32)
    with pytest.raises(BadRequest, match="EulerDiscreteScheduler: Only one of"):
        encoded(pipeline, scheduler="euler_karras")


def test_weights_that_can_not_be_read_are_a_model_error(tmp_path: Path) -> None:
    weights = build_checkpoint(tmp_path) / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="can't be loaded"):
        load(str(tmp_path), CPU, torch.float32)


def test_a_text_is_embedded_once_while_it_is_remembered(folder: Path) -> None:
    pipeline: Any = load(str(folder), CPU, torch.float32, embeddings=2)
    for prompt in ("", "a", "b", "b", "", "a"):
        encoded(pipeline, prompt=prompt, guidance_scale=1)
    # One of the two embeddings is that of the empty prompt, which is never evicted.
    assert (pipeline.embeddings.hits, pipeline.embeddings.misses) == (2, 4)


def test_without_room_no_text_is_remembered(folder: Path) -> None:
    pipeline: Any = load(str(folder), CPU, torch.float32, embeddings=0)
    for prompt in ("", "a", "a", ""):
        encoded(pipeline, prompt=prompt)
    assert pipeline.embeddings.hits == 0


def test_embeddings_serve_many_threads_and_nobody_writes_to_them(pipeline: Any) -> None:
    prompts = ["", *"abcdefg"] * 20
    with ThreadPoolExecutor(8) as pool:
        requests = list(pool.map(lambda prompt: encoded(pipeline, prompt=prompt), prompts))
    assert pipeline.embeddings.hits + pipeline.embeddings.misses == 2 * len(prompts)
    remembered = encoded(pipeline, prompt="a").conditioning["encoder_hidden_states"].clone()
    for request in requests:
        with torch.inference_mode():
            request.conditioning["encoder_hidden_states"].zero_()
    assert torch.equal(encoded(pipeline, prompt="a").conditioning["encoder_hidden_states"], remembered)


def test_a_request_never_gets_the_conditioning_of_one_that_is_gone(pipeline: Any) -> None:
    # A later request may reuse the address of an earlier one, so an address identifies no request.
    pictures = {prompt: denoised(pipeline, prompt=prompt, num_inference_steps=1).latents for prompt in "abcdefgh"}
    assert len({latents.numpy().tobytes() for latents in pictures.values()}) == len(pictures)


@torch.inference_mode()
def test_a_forward_that_is_filled_up_returns_its_requests_only(folder: Path, pipeline: Any) -> None:
    def outputs(of: Any, rows: int | None = None) -> np.ndarray:
        requests = [encoded(of, prompt="a"), encoded(of, prompt="b", guidance_scale=1)]
        return np.asarray(of.denoise(requests, rows))

    reference = Reference(outputs(load(str(folder), CPU, torch.float64)), outputs(pipeline))
    assert reference.exact.shape == (2, 4, 8, 8)
    parity = Parity.of([outputs(pipeline, 8)], [reference])
    assert parity.holds, parity


@pytest.mark.long
def test_a_compiled_denoiser_draws_the_same_in_forwards_of_any_size(
    folder: Path, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_(*args, **{**kwargs, "backend": "eager"}))
    compiled: Any = load(str(folder), CPU, torch.float32, compile=True)
    assert (compiled.compiled, pipeline.compiled) == (True, False)
    requests = [encoded(pipeline, prompt=prompt, guidance_scale=1) for prompt in "abcdefghijkl"]
    for count in range(1, len(requests) + 1):  # more sizes than dynamo keeps graphs for by default
        with torch.inference_mode():
            # The eager backend runs the same kernels.
            assert torch.equal(compiled.denoise(requests[:count]), pipeline.denoise(requests[:count]))


@torch.inference_mode()
def test_a_preview_of_the_model_that_ships_looks_like_its_picture() -> None:
    pipeline: Any = load(str(WEIGHTS), CPU, torch.float32)
    for place, prompt in enumerate(("a red circle on a blue background", "a small blue star, black background")):
        latents = denoised(pipeline, prompt=prompt, seed=place, num_inference_steps=12, width=64, height=64).latents
        preview, picture = pipeline.preview(latents), pipeline.decode(latents)
        small = nn.interpolate(picture, preview.shape[-2:], mode="area")
        assert torch.corrcoef(torch.stack([preview.flatten(), small.flatten()]))[0, 1] > 0.8


@torch.inference_mode()
def test_a_preview_is_small_however_large_the_picture_is(pipeline: Any) -> None:
    preview = pipeline.preview(torch.randn(1, 4, 64, 128))
    assert preview.shape == (1, 3, 128, 256)
    assert (preview.min() >= 0, preview.max() <= 1) == (True, True)

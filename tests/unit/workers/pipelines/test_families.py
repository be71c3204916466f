"""The families' features beyond parity with diffusers, which `tests/contract/test_parity.py` checks."""

import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.parity import Parity, Reference
from farm.errors import BadRequest, ModelError
from farm.specs.spec import RenderSpec
from tests.checkpoints import build_checkpoint, build_flux, build_sd3, build_sdxl
from workers import pipelines
from workers.models.checkpoints import open_checkpoint
from workers.models.memory_limit import memory_limit
from workers.pipelines import families, load
from workers.render.pipeline import Pipeline
from workers.render.request import RenderRequest

CPU = torch.device("cpu")
BUILDERS: dict[str, Callable[[Path], Path]] = {
    "StableDiffusionPipeline": build_checkpoint,
    "StableDiffusionXLPipeline": build_sdxl,
    "StableDiffusion3Pipeline": build_sd3,
    "FluxPipeline": build_flux,
}

TRACED = [
    name if name == "StableDiffusionPipeline" else pytest.param(name, marks=pytest.mark.long) for name in BUILDERS
]
"""Tracing the memory of a forward takes seconds, so `make test` does it for a single family."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: build(tmp_path_factory.mktemp(name)) for name, build in BUILDERS.items()}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: load(str(folder), CPU, torch.float32) for name, folder in folders.items()}


@torch.inference_mode()
def encoded(pipeline: Any, **spec: object) -> RenderRequest:
    values = {"prompt": "x", "seed": 1, "width": 64, "height": 64, "num_inference_steps": 2, **spec}
    request = RenderRequest("a", RenderSpec.parse(values))
    pipeline.plan(request)
    pipeline.encode(request)
    return request


@torch.inference_mode()
def drawn(pipeline: Any, **spec: object) -> torch.Tensor:
    request = encoded(pipeline, **spec)
    while not request.denoised:
        pipeline.step([request], pipeline.denoise([request]))
        request.step_index += 1
    picture: torch.Tensor = pipeline.decode(request.latents)
    return picture


def test_the_families_are_those_there_are_files_of() -> None:
    assert sorted(families()) == sorted(BUILDERS)


def test_a_fifth_family_costs_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kandinsky.py").write_text(
        "from workers.models.checkpoints import Family\n"
        "FAMILY = Family('KandinskyPipeline', ('unet',))\n"
        "def load(checkpoint, device, dtype, report, **options):\n"
        "    return checkpoint.family, dtype, options\n"
    )
    folder = tmp_path / "checkpoint"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(
        '{"_class_name": "KandinskyPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'
    )
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    monkeypatch.setattr(pipelines, "__path__", [*pipelines.__path__, str(tmp_path)])
    families.cache_clear()
    try:
        found = load(str(folder), CPU, torch.float32, compile=True)
        assert found == ("KandinskyPipeline", torch.float32, {"compile": True})
        assert set(families()) > set(BUILDERS)
    finally:
        families.cache_clear()
        del sys.modules["workers.pipelines.kandinsky"]
        del pipelines.kandinsky


@pytest.mark.parametrize("name", BUILDERS)
def test_a_missing_part_is_a_model_error_that_names_it(name: str, tmp_path: Path) -> None:
    BUILDERS[name](tmp_path)
    part = sorted(families()[name].FAMILY.parts)[-2]
    (tmp_path / part).rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=f"the checkpoint's {part} is missing"):
        load(str(tmp_path), CPU, torch.float32)


@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_loaded_is_reported_part_by_part(name: str, folders: dict[str, Path]) -> None:
    reported: list[str] = []
    pipeline = load(str(folders[name]), CPU, torch.bfloat16, reported.append)
    parts = families()[name].FAMILY.parts
    assert reported == [f"{part}, {place} of {len(parts)}" for place, part in enumerate(parts, 1)]
    assert (pipeline.family, pipeline.dtype) == (name, torch.bfloat16)


@pytest.mark.parametrize("name", BUILDERS)
def test_half_precision_draws_nearly_the_same(name: str, folders: dict[str, Path], loaded: dict[str, Any]) -> None:
    half = load(str(folders[name]), CPU, torch.bfloat16)
    spec = {"prompt": "two cats", "guidance_scale": 2, "negative_prompt": "low", "true_cfg_scale": 2}
    assert 0 < (drawn(half, **spec) - drawn(loaded[name], **spec)).abs().mean() < 0.03


@pytest.mark.parametrize("name", BUILDERS)
def test_a_preview_and_a_frame_have_the_pictures_proportions(name: str, loaded: dict[str, Any]) -> None:
    pipeline: Any = loaded[name]
    for width, height in ((96, 64), (96, 384)):
        latents = encoded(pipeline, width=width, height=height).latents
        with torch.inference_mode():
            preview = pipeline.preview(latents)
        factor = min(1, 256 / max(width, height))
        assert preview.shape == (1, 3, height * factor, width * factor)
        assert (preview.dtype, preview.isfinite().all()) == (torch.float32, True)


@pytest.mark.parametrize(("name", "multiple"), [("StableDiffusion3Pipeline", 16), ("FluxPipeline", 16)])
def test_a_size_that_is_no_whole_number_of_patches_is_a_bad_request(
    name: str, multiple: int, loaded: dict[str, Any]
) -> None:
    with pytest.raises(BadRequest, match=f"draws multiples of {multiple} pixels, not 72x64"):
        encoded(loaded[name], width=72)


@pytest.mark.parametrize(
    ("name", "native"),
    [
        ("StableDiffusionXLPipeline", (64, 64)),
        ("StableDiffusion3Pipeline", (64, 64)),
        ("FluxPipeline", (1024, 1024)),
    ],
)
def test_the_native_size_is_that_of_the_checkpoint(
    name: str, native: tuple[int, int], loaded: dict[str, Pipeline]
) -> None:
    assert loaded[name].native_size == native


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("StableDiffusionXLPipeline", ("77 tokens;", "77 tokens for text_encoder_2;")),
        (
            "StableDiffusion3Pipeline",
            ("77 tokens;", "77 tokens for text_encoder_2;", "256 tokens for text_encoder_3;"),
        ),
        ("FluxPipeline", ("77 tokens;", "512 tokens for text_encoder_2;")),
    ],
)
def test_each_text_encoder_says_what_it_leaves_out(name: str, limits: tuple[str, ...], loaded: dict[str, Any]) -> None:
    warnings = encoded(loaded[name], prompt="x" * 600, guidance_scale=1).warnings
    assert [warning.split(" left out: ")[0] for warning in warnings] == [
        f"the prompt was cut at {cut}" for cut in limits
    ]
    assert all(warning.split(" left out: ")[1].startswith("xxxx") for warning in warnings)
    assert encoded(loaded[name], prompt="x" * 70).warnings == []


def test_t5_takes_more_of_a_text_than_clip(loaded: dict[str, Any]) -> None:
    flux: Any = loaded["FluxPipeline"]
    assert [warning.split(";")[0] for warning in encoded(flux, prompt="x" * 100).warnings] == [
        "the prompt was cut at 77 tokens"
    ]
    pictures = [drawn(flux, prompt="x" * 100 + end) for end in ("", " y")]
    assert not torch.equal(*pictures)


def test_flux_guides_by_a_negative_prompt_only_with_true_cfg(loaded: dict[str, Any]) -> None:
    flux: Any = loaded["FluxPipeline"]
    both = encoded(flux, negative_prompt="low", true_cfg_scale=2)
    assert (both.rows, both.warnings) == (2, [])
    negative = encoded(flux, negative_prompt="low", guidance_scale=7.5)
    assert negative.rows == 1
    assert negative.warnings == ["the negative prompt has no effect: Flux needs a true_cfg_scale above 1 for it"]
    scale = encoded(flux, true_cfg_scale=2)
    assert scale.rows == 1
    assert scale.warnings == ["true_cfg_scale has no effect without a negative prompt"]
    assert "clip_skip has no effect" in encoded(flux, clip_skip=1).warnings[0]


def test_a_flux_that_takes_no_guidance_scale_draws_without(tmp_path: Path) -> None:
    schnell: Any = load(str(build_flux(tmp_path, guidance_embeds=False)), CPU, torch.float32)
    assert "guidance" not in encoded(schnell).conditioning
    assert torch.equal(drawn(schnell, guidance_scale=1), drawn(schnell, guidance_scale=7.5))


def test_sd3_without_t5_loads_neither_it_nor_its_tokenizer(tmp_path: Path, loaded: dict[str, Any]) -> None:
    smaller: Any = load(str(partial(build_sd3, t5=False)(tmp_path)), CPU, torch.float32)
    assert smaller.nbytes < loaded["StableDiffusion3Pipeline"].nbytes
    assert encoded(smaller, prompt="x" * 300, guidance_scale=1).warnings == [
        f"the prompt was cut at 77 tokens{encoder}; left out: {'x' * 200}" for encoder in ("", " for text_encoder_2")
    ]


def test_an_empty_negative_prompt_of_sdxl_is_zeros_where_its_config_says_so(loaded: dict[str, Any]) -> None:
    xl: Any = loaded["StableDiffusionXLPipeline"]
    negative, positive = encoded(xl, prompt="", guidance_scale=2).conditioning["encoder_hidden_states"]
    assert negative.abs().max() == 0 < positive.abs().max()
    assert encoded(xl, negative_prompt="low").conditioning["text_embeds"][0].abs().max() > 0


def test_sdxl_is_told_the_size_it_draws(loaded: dict[str, Any]) -> None:
    ids = encoded(loaded["StableDiffusionXLPipeline"], width=96, height=80).conditioning["time_ids"]
    assert ids.tolist() == [[80, 96, 0, 0, 80, 96]] * 2


def test_the_vae_of_sdxl_stays_in_float32_beside_float16(folders: dict[str, Path]) -> None:
    xl: Any = load(str(folders["StableDiffusionXLPipeline"]), CPU, torch.float16)
    assert (xl.dtype, xl.pipe.vae.dtype) == (torch.float16, torch.float32)
    plain: Any = load(str(folders["StableDiffusionPipeline"]), CPU, torch.float16)
    assert plain.pipe.vae.dtype == torch.float16


def test_sdxl_latents_are_unscaled_by_mean_and_deviation_where_the_vae_has_them(folders: dict[str, Path]) -> None:
    xl: Any = load(str(folders["StableDiffusionXLPipeline"]), CPU, torch.float32)
    latents, factor = torch.ones(1, 4, 1, 1), xl.pipe.vae.config.scaling_factor
    assert xl.unscaled(latents).flatten().tolist() == pytest.approx([1 / factor] * 4)
    xl.pipe.vae.register_to_config(latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 3.0, 4.0])
    assert xl.unscaled(latents).flatten().tolist() == pytest.approx([n / factor + n - 1 for n in (1, 2, 3, 4)])


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_a_transformer_compiles_its_blocks(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **kwargs: given.append(kwargs))
    load(str(folders[name]), CPU, torch.float32, compile=True)
    assert len(given) >= 2
    assert all(kwargs["fullgraph"] for kwargs in given)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no such thing"), r"\(StableDiffusionPipeline\) can't be loaded: ValueError: no such thing"),
        (ModelError("the checkpoint is odd"), "^the checkpoint is odd$"),
    ],
)
def test_a_family_that_fails_to_load_is_a_model_error_that_names_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(families()["StableDiffusionPipeline"].StableDiffusion, "amended", fail)
    with pytest.raises(ModelError, match=message) as caught:
        load(str(folders["StableDiffusionPipeline"]), CPU, torch.float32)
    assert error in (caught.value, caught.value.__cause__)


def test_a_device_without_memory_for_a_model_is_told_from_other_errors(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(families()["StableDiffusionPipeline"].StableDiffusion, "amended", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load(str(folders["StableDiffusionPipeline"]), CPU, torch.float32)


def test_a_file_that_can_not_be_read_is_a_model_error(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.mkdir()
    with pytest.raises(ModelError, match="can't be loaded: IsADirectoryError"):
        load(str(folder), CPU, torch.float32)


def test_latents_of_flux_lie_packed_as_diffusers_has_them(loaded: dict[str, Any]) -> None:
    flux: Any = loaded["FluxPipeline"]
    generator = torch.Generator().manual_seed(1)
    theirs, _ = flux.pipe.prepare_latents(1, 16, 80, 96, torch.float32, CPU, generator)
    ours = encoded(flux, width=96, height=80, scheduler="euler").latents
    assert ours.shape == (1, 5, 6, 64)
    assert torch.equal(ours.flatten(1, 2), theirs)


@pytest.mark.parametrize("name", TRACED)
def test_what_a_forward_takes_is_known_before_it_takes_it(loaded: dict[str, Any], name: str) -> None:
    pipeline, request = loaded[name], encoded(loaded[name], width=192, height=192)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        inputs = torch.cat([request.latents] * request.rows)
        pipeline.forward(inputs, torch.ones(request.rows), request.conditioning)
    now = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    # Memory that operators use internally, such as for a convolution in another layout, is not counted.
    assert 0.75 * peak <= pipeline.forward_bytes(request.spec) <= peak


@pytest.mark.parametrize("name", TRACED)
def test_the_configs_alone_say_what_a_forward_takes_at_least(
    loaded: dict[str, Any], folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    weights = shutil.ignore_patterns("*.safetensors")
    folder = shutil.copytree(folders[name], tmp_path / name, ignore=weights)
    outline: Any = load(str(folder), torch.device("meta"), torch.float32)
    spec = encoded(loaded[name], width=192, height=192).spec
    assert outline.nbytes == loaded[name].nbytes
    assert 0.75 * (known := loaded[name].forward_bytes(spec)) <= outline.forward_bytes(spec) <= known
    halved = load(str(folder), torch.device("meta"), torch.bfloat16)
    assert (halved.nbytes, halved.dtype) == (outline.nbytes // 2, torch.bfloat16)


@pytest.mark.parametrize("name", TRACED)
def test_the_limit_is_the_next_size_that_surely_does_not_fit(loaded: dict[str, Any], name: str) -> None:
    pipeline: Any = loaded[name]
    total = pipeline.nbytes + pipeline.forward_bytes(RenderSpec(prompt="", seed=0, width=320, height=320))
    limit = memory_limit(pipeline, total)
    assert limit is not None
    rows = 1 if name == "FluxPipeline" else 2
    assert limit.pixels == rows * 384 * 384 - 1
    width, height = pipeline.native_size
    assert limit.native_factor == limit.pixels // (width * height)
    assert memory_limit(pipeline, 2**50) is None
    nothing = memory_limit(pipeline, pipeline.nbytes)
    assert nothing is not None
    assert nothing.native_factor < rows


@pytest.mark.parametrize("name", BUILDERS)
def test_the_rows_of_a_request_are_the_factor_that_a_worker_publishes(loaded: dict[str, Any], name: str) -> None:
    pipeline: Any = loaded[name]
    for guidance_scale, true_cfg, negative in product((1.0, 5.0), (1.0, 4.0), ("", "low")):
        fields = {"guidance_scale": guidance_scale, "true_cfg_scale": true_cfg, "negative_prompt": negative}
        request = encoded(pipeline, **fields)
        guided = bool(negative) and true_cfg > 1 if name == "FluxPipeline" else guidance_scale > 1
        assert request.rows == pipeline.guidance.factor_of(request.spec) == 1 + guided
        assert request.conditioning["encoder_hidden_states"].shape[0] == request.rows


def test_a_unet_with_distilled_guidance_takes_one_row(tmp_path: Path) -> None:
    distilled: Any = load(str(build_checkpoint(tmp_path)), CPU, torch.float32)
    distilled.denoiser.register_to_config(time_cond_proj_dim=8)
    request = RenderRequest("a", RenderSpec(prompt="x", seed=1, guidance_scale=7.5))
    distilled.plan(request)
    assert request.rows == distilled.guidance.factor_of(request.spec) == 1


def test_a_family_can_take_more_rows_and_combine_them_in_its_own_way(folders: dict[str, Path]) -> None:
    class Averaged(families()["StableDiffusionPipeline"].StableDiffusion):
        def rows(self, spec: RenderSpec) -> int:
            return 2

        def combine(self, outputs: torch.Tensor, requests: Sequence[RenderRequest]) -> torch.Tensor:
            return outputs.unflatten(0, (len(requests), 2)).mean(1)

    folder = folders["StableDiffusionPipeline"]
    family = families()["StableDiffusionPipeline"].FAMILY
    checkpoint = open_checkpoint(str(folder), {family.name: family})
    averaged = Averaged(checkpoint, CPU, torch.float32, lambda _: None)
    with torch.inference_mode():
        requests = [encoded(averaged, prompt=prompt, guidance_scale=1) for prompt in "ab"]
        assert averaged.denoise(requests).shape == (2, 4, 8, 8)
        rounded, exact = (
            average_of_two_texts(load(str(folder), CPU, dtype), requests[0].latents)
            for dtype in (torch.float32, torch.float64)
        )
        parity = Parity.of([np.asarray(averaged.denoise(requests)[:1])], [Reference(exact, rounded)])
    assert parity.holds, parity
    assert np.abs(exact).max() > 100 * parity.tolerance


def average_of_two_texts(pipeline: Any, latents: torch.Tensor) -> np.ndarray:
    """Return the mean of the outputs for no text and for `a`, from separate forwards with the same noise."""
    texts = [encoded(pipeline, prompt=prompt, guidance_scale=1) for prompt in ("", "a")]
    assert all(torch.equal(text.latents, latents) for text in texts)
    return np.mean([np.asarray(pipeline.denoise([text])) for text in texts], axis=0)


def test_a_picture_that_sd3_has_no_positions_for_is_refused_before_it_is_begun(loaded: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="draws up to 384 pixels a side, not 64x400"):
        encoded(loaded["StableDiffusion3Pipeline"], width=64, height=400)

"""`max_sequence_length` from the spec to the picture: an example of a field that only the worker uses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.parity import Parity, References
from farm.errors import BadRequest, InvalidInput
from farm.specs.spec import RenderSpec
from tests.checkpoints import build_checkpoint, build_flux, build_sd3, build_sdxl
from tests.parity import draw
from workers.pipelines import load
from workers.render.request import RenderRequest

CPU = torch.device("cpu")
LONG = "a long prompt, " * 30


@pytest.mark.parametrize("tokens", [0, 513, 1.5])
def test_a_limit_out_of_bounds_is_refused_at_submit(tokens: float) -> None:
    with pytest.raises(InvalidInput, match=r"spec: max_sequence_length: should be"):
        RenderSpec.parse({"prompt": "a", "max_sequence_length": tokens})


def test_a_spec_without_a_limit_is_written_and_hashed_as_by_the_release_before() -> None:
    spec = RenderSpec(prompt="a", seed=1)
    assert "max_sequence_length" not in spec.to_json()
    assert spec.sha256() == "346a7e436b7ca0e76fb1414d6dc3102c87eee4975dad3686c3742a5e89b786bf"


def test_a_limit_is_other_work_and_survives_its_json() -> None:
    spec = RenderSpec(prompt="a", seed=1, max_sequence_length=128)
    assert spec.sha256() != RenderSpec(prompt="a", seed=1).sha256()
    assert RenderSpec.model_validate_json(spec.to_json()) == spec


@pytest.mark.parametrize("build", [build_sd3, build_flux])
def test_prompts_of_different_limits_are_rendered_together_as_diffusers_renders_each(
    build: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = build(tmp_path)
    specs = [
        RenderSpec(
            prompt=prompt,
            negative_prompt="low, " * 30,
            true_cfg_scale=3,
            max_sequence_length=tokens,
            seed=seed,
            num_inference_steps=2,
            width=64,
            height=64,
        )
        for seed, (prompt, tokens) in enumerate([(LONG, None), (LONG, 32), ("a cat", 32), (LONG, 512), (LONG, 1)])
    ]
    pictures = draw(load(str(folder), CPU, torch.float32), specs, slots=len(specs))
    theirs = References(folder)
    parity = Parity.of(pictures, [theirs.of(spec) for spec in specs])
    assert parity.holds, parity


@pytest.mark.parametrize(
    ("build", "encoder"), [(build_sd3, " for text_encoder_3"), (build_flux, " for text_encoder_2")]
)
@torch.inference_mode()
def test_the_warning_says_what_the_limit_cuts_off(build: Callable[[Path], Path], encoder: str, tmp_path: Path) -> None:
    pipeline = load(str(build(tmp_path)), CPU, torch.float32)
    request = RenderRequest("a", RenderSpec(prompt="x" * 40, seed=1, guidance_scale=1, max_sequence_length=8))
    pipeline.plan(request)
    pipeline.encode(request)
    (warning,) = request.warnings
    assert warning.startswith(f"the prompt was cut at 8 tokens{encoder}; left out: x")


@pytest.mark.parametrize("build", [build_checkpoint, build_sdxl])
def test_a_family_without_t5_refuses_a_limit(build: Callable[[Path], Path], tmp_path: Path) -> None:
    pipeline = load(str(build(tmp_path)), CPU, torch.float32)
    with pytest.raises(BadRequest, match="has no max_sequence_length: a StableDiffusion"):
        pipeline.plan(RenderRequest("a", RenderSpec(prompt="x", seed=1, max_sequence_length=128)))

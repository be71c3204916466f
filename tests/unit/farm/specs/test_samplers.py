"""`farm.specs.samplers` compared with diffusers' noise schedulers and its four pipelines."""

import hashlib
import json
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from farm.errors import InvalidInput
from farm.specs import samplers
from farm.specs.samplers import SAMPLERS, UNSUPPORTED, Recipe, find_sampler, sampler_names
from farm.specs.spec import RenderSpec
from tests.checkpoints import build_checkpoint, build_flux, build_sd3, build_sdxl

FAMILIES = {
    "StableDiffusionPipeline": ("diffusion", build_checkpoint),
    "StableDiffusionXLPipeline": ("diffusion", build_sdxl),
    "StableDiffusion3Pipeline": ("flow", build_sd3),
    "FluxPipeline": ("flow", build_flux),
}
USES = [
    pytest.param(recipe, family, id=f"{name}-{family}")
    for family, (kind, _) in FAMILIES.items()
    for name, sampler in SAMPLERS.items()
    if (recipe := getattr(sampler, kind)) is not None and recipe.fits(family)
]
RECIPES = [
    pytest.param(recipe, id=f"{name}-{kind}")
    for name, sampler in SAMPLERS.items()
    for kind in ("diffusion", "flow")
    if (recipe := getattr(sampler, kind)) is not None
]
MEAN, DEVIATION = 0.8, 0.5
"""The normal distribution of the latents for which the exact denoiser is made."""
TRIED = Path(__file__).with_name("samplers_tried.json")
"""The hash of the table and the version of diffusers that passed the tests marked `long`."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """diffusers' own pipeline of each family."""
    loaded = {}
    for family, (_, build) in FAMILIES.items():
        loaded[family] = diffusers.DiffusionPipeline.from_pretrained(build(tmp_path_factory.mktemp(family)))
        loaded[family].set_progress_bar_config(disable=True)
    return loaded


def make(recipe: Recipe, own: Any) -> Any:
    return getattr(diffusers, recipe.class_name).from_config(own, **recipe.over(own))


def draw(pipe: Any, recipe: Recipe, steps: int, output_type: str = "np") -> torch.Tensor:
    """Draw one picture, or its latents, with another noise scheduler; the pipeline keeps its own."""
    own = pipe.scheduler
    pipe.scheduler = make(recipe, own.config)
    try:
        # The pipelines of flow models pass no generator to a step.
        with torch.random.fork_rng():
            torch.manual_seed(1)
            generator = torch.Generator().manual_seed(0)
            images = pipe(
                "two cats",
                num_inference_steps=steps,
                guidance_scale=1.0,
                width=64,
                height=64,
                generator=generator,
                output_type=output_type,
            ).images
        return torch.as_tensor(images)
    finally:
        pipe.scheduler = own


def know_a_gaussian(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the denoiser by the exact one for latents drawn from one normal distribution."""
    if hasattr(pipe, "unet"):
        alphas = diffusers.DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod.double()

        def noise(sample: torch.Tensor, timestep: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            low = int(timestep)
            part = float(timestep) - low
            alpha = alphas[low] ** (1 - part) * alphas[min(low + 1, len(alphas) - 1)] ** part
            signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
            return (((sample - signal * MEAN) * sigma / (alpha * DEVIATION**2 + sigma**2)).float(),)

        monkeypatch.setattr(pipe.unet, "forward", noise)
        return

    most = 1000 if isinstance(pipe, diffusers.StableDiffusion3Pipeline) else 1

    def velocity(hidden_states: torch.Tensor, timestep: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        sigma = timestep.flatten()[0].double() / most
        away = (hidden_states - (1 - sigma) * MEAN) / (((1 - sigma) * DEVIATION) ** 2 + sigma**2)
        return ((sigma * away - (1 - sigma) * DEVIATION**2 * away - MEAN).float(),)

    monkeypatch.setattr(pipe.transformer, "forward", velocity)


@pytest.mark.long
@pytest.mark.parametrize(("recipe", "family"), USES)
def test_diffusers_own_pipeline_draws_with_it(recipe: Recipe, family: str, pipes: dict[str, Any]) -> None:
    pictures = [draw(pipes[family], recipe, steps) for steps in (1, 2, 5)]
    for picture in pictures:
        assert picture.isfinite().all()
        assert 0.02 < picture.std() < 0.4
    assert (pictures[-1] - pictures[0]).abs().max() > 1e-3


@pytest.mark.long
@pytest.mark.parametrize(("recipe", "family"), USES)
def test_a_model_that_knows_its_pictures_draws_them(
    recipe: Recipe, family: str, pipes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    know_a_gaussian(pipes[family], monkeypatch)
    latents = draw(pipes[family], recipe, 30, "latent")
    assert float(latents.mean()) == pytest.approx(MEAN, abs=0.1)
    # LCM jumps to the picture at every step; a model that was not trained for it loses contrast.
    lowest = 0.25 if "LCM" in recipe.class_name else 0.35
    assert lowest < float(latents.std()) < 0.65


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.flow and sampler.flow.families])
def test_other_pipelines_of_its_kind_refuse_it(name: str, pipes: dict[str, Any]) -> None:
    assert not SAMPLERS[name].flow.fits("FluxPipeline")
    with pytest.raises((TypeError, ValueError), match="sigmas"):
        draw(pipes["FluxPipeline"], SAMPLERS[name].flow, 5)


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
def test_order_and_noise_are_the_schedulers_own(recipe: Recipe, pipes: dict[str, Any]) -> None:
    flow = recipe.class_name.startswith(("FlowMatch", "LTX")) or "flow_shift" in recipe.renamed
    scheduler = make(recipe, pipes["StableDiffusion3Pipeline" if flow else "StableDiffusionPipeline"].scheduler.config)
    scheduler.set_timesteps(5)
    assert recipe.order == scheduler.order
    # PNDM takes its first step twice, but reports order 1.
    forwards = {1: (5, 6), 2: (2 * 5 - 1,)}[recipe.order]
    assert len(scheduler.timesteps) in forwards
    generator, sample = torch.Generator().manual_seed(0), torch.ones(1, 4, 8, 8)
    before = generator.get_state()
    given = {"generator": generator, "eta": 0.0}
    accepted = {key: value for key, value in given.items() if key in signature(scheduler.step).parameters}
    with torch.random.fork_rng():
        elsewhere = torch.get_rng_state()
        for timestep in scheduler.timesteps:
            if hasattr(scheduler, "scale_model_input"):  # LMS warns if this call is missing
                scheduler.scale_model_input(sample, timestep)
            sample = scheduler.step(sample / 10, timestep, sample, return_dict=False, **accepted)[0]
        assert torch.equal(torch.get_rng_state(), elsewhere)
    assert recipe.draws_noise != torch.equal(generator.get_state(), before)


@pytest.mark.long
def test_a_flow_is_sampled_with_the_checkpoints_own_shift(pipes: dict[str, Any]) -> None:
    own = pipes["StableDiffusion3Pipeline"].scheduler
    own.set_timesteps(5)
    scheduler = make(SAMPLERS["dpmpp_2m"].flow, own.config)
    scheduler.set_timesteps(5)
    assert scheduler.config.flow_shift == own.config.shift == 3.0
    assert float(scheduler.timesteps.float().mean()) > 600


def test_the_table_has_passed_the_long_tests_with_the_installed_diffusers() -> None:
    """These tests check diffusers as much as the table, so `make test` requires them again only when either changes."""
    table = hashlib.sha256(repr(list(SAMPLERS.items())).encode()).hexdigest()
    found = {"diffusers": diffusers.__version__, "table": table}
    assert json.loads(TRIED.read_text()) == found, f"make test-long ARGS='-k samplers', then write this to {TRIED}"


def test_every_noise_scheduler_of_diffusers_is_supported_or_told_why_not() -> None:
    known = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")}
    supported = {
        recipe.class_name for sampler in SAMPLERS.values() for recipe in (sampler.diffusion, sampler.flow) if recipe
    }
    unsupported = {name for name in UNSUPPORTED if name.endswith("Scheduler")}
    assert supported | unsupported == known
    assert not supported & unsupported
    assert not set(SAMPLERS) & set(UNSUPPORTED)


def test_a_class_name_stands_for_the_class_without_variants() -> None:
    for sampler in SAMPLERS.values():
        for kind in ("diffusion", "flow"):
            recipe = getattr(sampler, kind)
            if recipe is not None:
                found = getattr(find_sampler(recipe.class_name), kind)
                assert found.class_name == recipe.class_name
                assert set(found.config) <= {"use_flow_sigmas", "prediction_type"}
    assert find_sampler("EulerDiscreteScheduler").flow is None
    assert find_sampler("FlowMatchEulerDiscreteScheduler").diffusion is None


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_sampler_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        RenderSpec.parse({"prompt": "a cat", "scheduler": name})
    assert f"{name} is not supported: it {UNSUPPORTED[name]}" in str(refused.value)


def test_an_unknown_sampler_is_refused_with_the_known_names() -> None:
    with pytest.raises(InvalidInput) as refused:
        RenderSpec.parse({"prompt": "a cat", "scheduler": "eulr"})
    assert all(name in str(refused.value) for name in ("'eulr'", *sampler_names()))


def test_the_page_is_the_one_the_code_prints() -> None:
    page = Path(samplers.__file__).parents[2] / "docs" / "samplers.md"
    assert page.read_text() == samplers.page(), "python -m farm.specs.samplers > docs/samplers.md"

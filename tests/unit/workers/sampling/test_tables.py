"""Samplers as tables, compared with diffusers' noise schedulers from which they are made."""

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import pytest
import torch

from farm.specs.samplers import SAMPLERS, Recipe
from farm.specs.spec import RenderSpec
from workers.render.request import RenderRequest, Sampling
from workers.sampling import tables

SHAPE = (4, 6, 8)
DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
KINDS = ("epsilon", "v_prediction", "flow")
RECIPES = [
    pytest.param(recipe, kind, id=f"{name}-{kind}")
    for name, sampler in SAMPLERS.items()
    for kind in KINDS
    if (recipe := sampler.flow if kind == "flow" else sampler.diffusion) is not None
]


@cache
def own_config(kind: str) -> Any:
    """Return the noise scheduler's config of a checkpoint whose model predicts `kind`."""
    if kind == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
    return diffusers.EulerDiscreteScheduler(**DIFFUSION, prediction_type=kind).config


def maker(recipe: Recipe, kind: str, steps: int, **config: Any) -> Callable[[], Any]:
    """Return a function that makes a recipe's scheduler for a model of that kind, with its timesteps set."""
    own = {**own_config(kind), "clip_sample": False, "skip_prk_steps": True}

    def make() -> Any:
        overridden = {**recipe.over(own), **config}
        scheduler = getattr(diffusers, recipe.class_name).from_config(own, **overridden)
        scheduler.set_timesteps(steps)
        return scheduler

    return make


def started(table: Sampling, seed: int = 0) -> RenderRequest:
    request = RenderRequest("a", RenderSpec(prompt="x"))
    request.sampling, request.generator = table, torch.Generator().manual_seed(seed)
    tables.start(request, torch.randn(1, *SHAPE, generator=request.generator))
    return request


def walk(request: RenderRequest) -> list[torch.Tensor]:
    """Return the latents after each step, with random outputs in place of a denoiser's."""
    outputs, seen = torch.Generator().manual_seed(7), []
    while not request.denoised:
        tables.inputs([request])
        output = torch.randn(1, *SHAPE, generator=outputs)
        if request.scheduler is None:
            tables.step([request], output)
        else:
            tables.step_object(request, output)
        request.step_index += 1
        seen.append(request.latents)
    return seen


def as_object(table: Sampling) -> Sampling:
    """Return the same sampler without its table, stepped as in diffusers' pipelines."""
    return Sampling(table.name, table.timesteps, table.init_noise_sigma, table.make, table.step_kwargs)


@pytest.mark.parametrize("most_steps", [5, pytest.param(25, marks=pytest.mark.long)])
@pytest.mark.parametrize(("recipe", "kind"), RECIPES)
def test_a_table_steps_as_its_scheduler_and_draws_the_same_noise(recipe: Recipe, kind: str, most_steps: int) -> None:
    for steps in (1, 2, 3, most_steps):
        table = tables.tabulate(maker(recipe, kind, steps), eta=0.5)
        ours, theirs = started(table), started(as_object(table))
        assert theirs.scheduler is not None
        for mine, own in zip(walk(ours), walk(theirs), strict=True):
            # Single operations in float32 round alike on every CPU; the limit is 7 times the tables' error.
            assert (mine - own).abs().max() <= 1e-5 * own.abs().max().clamp_min(1.0), steps
        assert torch.equal(ours.generator.get_state(), theirs.generator.get_state())


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_most_samplers_are_tables(kind: str) -> None:
    recipes = [sampler.flow if kind == "flow" else sampler.diffusion for sampler in SAMPLERS.values()]
    stepped_as_objects = {
        recipe.class_name
        for recipe in recipes
        if recipe is not None and not tables.tabulate(maker(recipe, kind, 20), eta=0.0).lags
    }
    assert stepped_as_objects <= {"DEISMultistepScheduler"}


@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        ("DDIMScheduler", {"clip_sample": True}),
        ("DDIMScheduler", {"thresholding": True}),
        ("DPMSolverMultistepScheduler", {"thresholding": True}),
        ("PNDMScheduler", {"skip_prk_steps": False}),
    ],
)
def test_what_is_not_linear_or_looks_back_too_far_has_no_table(class_name: str, config: dict[str, bool]) -> None:
    found = tables.tabulate(maker(Recipe(class_name), "epsilon", 6, **config), eta=0.0)
    assert (found.lags, found.weights) == (0, ())
    assert started(found).scheduler is not None


def test_a_scheduler_whose_own_rounding_shows_has_no_table() -> None:
    recipe = SAMPLERS["deis"].flow
    assert recipe is not None
    assert tables.tabulate(maker(recipe, "flow", 3)).lags == 0


def test_a_retry_of_a_step_draws_the_same_noise() -> None:
    recipe = SAMPLERS["euler_a"].diffusion
    assert recipe is not None
    table = tables.tabulate(maker(recipe, "epsilon", 4))
    once, twice = started(table), started(table)
    output = torch.ones(1, *SHAPE)
    before = twice.latents
    tables.step([twice], output)
    twice.latents, twice.history = before, ()
    for request in (once, twice):
        tables.step([request], output)
    assert torch.equal(once.latents, twice.latents)
    assert torch.equal(once.generator.get_state(), twice.generator.get_state())


def test_samplers_of_all_kinds_step_together_as_each_alone() -> None:
    recipes = [SAMPLERS[name].diffusion for name in ("euler_a", "dpmpp_3m", "lms", "ddim", "heun")]
    tabulated = [tables.tabulate(maker(recipe, "epsilon", 6)) for recipe in recipes if recipe is not None]
    together, alone = ([started(table, seed) for seed, table in enumerate(tabulated)] for _ in range(2))
    outputs = torch.Generator().manual_seed(1)
    for _ in range(6):
        output = torch.randn(len(tabulated), *SHAPE, generator=outputs)
        moved = tables.step(together, output)
        for place, request in enumerate(alone):
            tables.step([request], output[place : place + 1])
            assert torch.allclose(moved[place : place + 1], request.latents, rtol=1e-5, atol=1e-5)
        for request in (*together, *alone):
            request.step_index += 1


def test_one_requests_nan_stays_its_own() -> None:
    names = ("dpmpp_3m", "euler")
    recipes = [SAMPLERS[name].diffusion for name in names]
    broken, healthy = (started(tables.tabulate(maker(recipe, "epsilon", 4))) for recipe in recipes if recipe)
    output = torch.randn(2, *SHAPE)
    output[0] = torch.nan
    for _ in range(2):
        tables.step([broken, healthy], output)
        for request in (broken, healthy):
            request.step_index += 1
    assert broken.latents.isnan().all()
    assert healthy.latents.isfinite().all()


def test_latents_that_somebody_holds_are_never_written_to() -> None:
    recipe = SAMPLERS["dpmpp_3m"].diffusion
    assert recipe is not None
    request = started(tables.tabulate(maker(recipe, "epsilon", 5)))
    held = [(request.latents, request.latents.clone())]
    while not request.denoised:
        tables.inputs([request])
        tables.step([request], torch.randn(1, *SHAPE))
        request.step_index += 1
        held.append((request.latents, request.latents.clone()))
    assert all(torch.equal(latents, copy) for latents, copy in held)

"""The engine draws the same picture as diffusers for the same request and seed, alone and in shared forwards.

Covers all families with all samplers of their kind of model. Random weights, float32 on the CPU, one thread; pictures
are compared before they are rounded to 8 bits, with the tolerance of `benchmarks.parity`.
"""

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.parity import Parity, Reference, References
from farm.specs.samplers import SAMPLERS
from farm.specs.spec import RenderSpec
from tests.checkpoints import build_checkpoint, build_flux, build_sd3, build_sdxl
from tests.parity import draw
from workers.pipelines import load
from workers.render.request import RenderRequest

CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "sd": build_checkpoint,
    "sd-v": partial(build_checkpoint, prediction_type="v_prediction"),
    "sdxl": build_sdxl,
    "sd3": build_sd3,
    "sd3-without-t5": partial(build_sd3, t5=False),
    "flux": build_flux,
}
SHARES = {"sd": (0, 3), "sdxl": (1, 3), "sd-v": (2, 3), "sd3": (0, 2), "sd3-without-t5": (1, 2), "flux": (0, 2)}
"""(first, every): the slice of each checkpoint's samplers that `make test` covers, with half of their specs.

`make test-long` covers all samplers and specs.
"""
PROMPTS = ("a red circle on a blue square", "", "an OLD house, über the water", "a long prompt, " * 8, "two cats")
STEPS = ((1, 2), (3, 2), (5, 2), (1, 4))


def specs_of(place: int, sampler: str | None, family: str) -> list[RenderSpec]:
    """Return specs of a sampler with and without guidance and negative prompt, in an odd and an even number of steps.

    The other fields that the family supports vary among them.
    """
    diffusion, flux = family.startswith("StableDiffusion") and "3" not in family, family == "FluxPipeline"
    specs = []
    choices = list(product((1, 7.5), ("", "blurry, low"), STEPS[place % len(STEPS)]))
    for guidance_scale, negative_prompt, steps in choices:
        # A negative prompt without guidance does not change the picture, so its reference is drawn once.
        guides = negative_prompt if guidance_scale > 1 or flux else ""
        index = choices.index((guidance_scale, guides, steps))
        large = (place + 3 * index) % 16 == 0
        specs.append(
            RenderSpec(
                prompt=PROMPTS[(place + index) % len(PROMPTS)],
                negative_prompt=negative_prompt,
                guidance_scale=guidance_scale,
                guidance_rescale=0.7 if diffusion and (place + index) % 3 == 0 else 0,
                true_cfg_scale=2.5 if flux and (place + index) % 3 else 1,
                clip_skip=1 if not flux and (place + index) % 5 == 0 else None,
                max_sequence_length=77 if not diffusion and (place + index) % 3 == 0 else None,
                eta=0.5 if (place + index) % 2 else 0,
                num_inference_steps=steps,
                width=96 if large else 64,
                height=80 if large else 64,
                seed=100 * place + index,
                scheduler=sampler,
            )
        )
    return specs


class Sides:
    """A checkpoint loaded by the farm and by diffusers, with values that an engine does not return."""

    def __init__(self, folder: Path, first: int = 0, every: int = 1) -> None:
        self.references = References(folder)
        self.pipeline: Any = load(str(folder), torch.device("cpu"), torch.float32)
        self.forwards: list[list[tuple[str | None, int, int]]] = []
        """The sampler, step and number of rows of each request, one list for each forward."""
        self._denoise = self.pipeline.denoise
        self.pipeline.denoise = self.denoise
        kind, family = self.pipeline.samplers, self.pipeline.family
        recipes = {name: getattr(sampler, kind) for name, sampler in SAMPLERS.items()}
        fitting = [name for name, recipe in recipes.items() if recipe and recipe.fits(family)]
        self.samplers = [None, *fitting[first::every]]
        self.specs = [
            spec
            for place, name in enumerate(self.samplers)
            for number, spec in enumerate(specs_of(place, name, family))
            if every == 1 or number.bit_count() % 2 == place % 2  # half of them, with each choice twice
        ]

    def denoise(self, requests: list[RenderRequest], rows: int | None = None) -> torch.Tensor:
        self.forwards.append([(request.spec.scheduler, request.step_index, request.rows) for request in requests])
        return self._denoise(requests, rows)

    def render(self, specs: list[RenderSpec], slots: int, **options: bool) -> list[np.ndarray]:
        """Return the float pictures of the specs, from an engine with that many slots."""
        self.forwards.clear()
        return draw(self.pipeline, specs, slots, **options)

    def compare(self, specs: list[RenderSpec], pictures: list[np.ndarray]) -> dict[str, Parity]:
        """Return the errors of both implementations by sampler."""
        compared: dict[str, tuple[list[np.ndarray], list[Reference]]] = {}
        for spec, picture in zip(specs, pictures, strict=True):
            ours, theirs = compared.setdefault(spec.scheduler or "own", ([], []))
            ours.append(picture)
            theirs.append(self.references.of(spec))
        return {sampler: Parity.of(*sides) for sampler, sides in compared.items()}

    @torch.inference_mode()
    def finish(self, request: RenderRequest, forwards: int = 10**6) -> RenderRequest:
        """Denoise a request without an engine, to its end or for at most `forwards` forwards."""
        self.pipeline.plan(request)
        self.pipeline.encode(request)
        while not request.denoised and request.step_index < forwards:
            self.pipeline.step([request], self._denoise([request]))
            request.step_index += 1
        return request


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    # Models this small gain nothing from more threads; on a busy machine, threads that wait for each other made the
    # tests 100 times slower.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(
    scope="module",
    params=[*CHECKPOINTS, *(pytest.param(f"{name}-all", marks=pytest.mark.long) for name in CHECKPOINTS)],
)
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    name = request.param.removesuffix("-all")
    folder = CHECKPOINTS[name](tmp_path_factory.mktemp(name))
    return Sides(folder) if name != request.param else Sides(folder, *SHARES[name])


def test_a_request_alone_is_the_pipelines_picture(sides: Sides) -> None:
    compared = sides.compare(sides.specs, sides.render(sides.specs, slots=1))
    assert {len(requests) for requests in sides.forwards} == {1}
    assert not {sampler: parity for sampler, parity in compared.items() if not parity.holds}


def test_neighbours_do_not_show(sides: Sides) -> None:
    specs = random.Random(0).sample(sides.specs, len(sides.specs))
    compared = sides.compare(specs, sides.render(specs, slots=12))
    assert not {sampler: parity for sampler, parity in compared.items() if not parity.holds}
    shared = [requests for requests in sides.forwards if len(requests) > 1]
    assert len(shared) > len(sides.forwards) / 2
    assert any(len({sampler for sampler, _, _ in requests}) >= 5 for requests in shared)
    assert any(len({step for _, step, _ in requests}) >= 3 for requests in shared)
    assert any({rows for _, _, rows in requests} == {1, 2} for requests in shared)


def test_pictures_of_other_specs_are_further_apart_than_the_tolerance(sides: Sides) -> None:
    spec = RenderSpec(prompt="two cats", negative_prompt="low", num_inference_steps=4, seed=1, width=64, height=64)
    spec = spec.model_copy(update={"true_cfg_scale": 2.0})
    others = {"prompt": "a dog", "negative_prompt": "high", "num_inference_steps": 3, "guidance_scale": 3.0, "seed": 2}
    for name, value in others.items():
        other = sides.references.of(spec.model_copy(update={name: value}))
        parity = Parity.of([other.rounded], [sides.references.of(spec)])
        assert parity.error > 20 * parity.tolerance, name


def test_a_resumed_request_draws_the_same_bytes(sides: Sides) -> None:
    for place, sampler in enumerate(sides.samplers):
        spec = RenderSpec(
            prompt="x", num_inference_steps=4, seed=place, scheduler=sampler, eta=0.5, width=64, height=64
        )
        whole = sides.finish(RenderRequest("whole", spec))
        begun = sides.finish(RenderRequest("begun", spec), forwards=1 + place % 3)
        written = begun.snapshot(sides.pipeline.sha256)
        before = written.latents.clone()
        assert torch.equal(sides.finish(RenderRequest("resumed", spec, resume=written)).latents, whole.latents), sampler
        assert torch.equal(written.latents, before)


def test_a_deterministic_request_draws_the_same_bytes_among_any_neighbours(sides: Sides) -> None:
    specs = random.Random(1).sample([spec for spec in sides.specs if spec.width == 64], 16)
    alone = sides.render(specs, slots=1, deterministic=True)
    order = random.Random(2).sample(range(len(specs)), len(specs))
    beside = sides.render([specs[place] for place in order], slots=8, deterministic=True)
    for place, picture in zip(order, beside, strict=True):
        assert np.array_equal(picture, alone[place]), specs[place]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """A checkpoint whose config makes PNDM take Runge-Kutta steps and DDIM clip; sampler tables support neither."""
    return Sides(build_sdxl(tmp_path_factory.mktemp("objects"), skip_prk_steps=False, clip_sample=True))


@pytest.mark.parametrize("sampler", ["pndm", "ddim"])
def test_a_sampler_that_is_no_table_is_stepped_as_the_object_it_is(objects: Sides, sampler: str) -> None:
    specs = [
        RenderSpec(prompt="x", num_inference_steps=steps, seed=1, scheduler=sampler, eta=0.5, width=64, height=64)
        for steps in (5, 6)
    ]
    for slots in (1, 2):
        compared = objects.compare(specs, objects.render(specs, slots))
        assert all(parity.holds for parity in compared.values()), compared
    whole = objects.finish(RenderRequest("whole", specs[0]))
    assert whole.scheduler is not None
    for forwards in range(1, len(whole.sampling.timesteps)):
        written = objects.finish(RenderRequest("begun", specs[0]), forwards).snapshot(objects.pipeline.sha256)
        resumed = objects.finish(RenderRequest("resumed", specs[0], resume=written))
        assert torch.equal(resumed.latents, whole.latents)


def test_an_outdated_scheduler_config_is_mended_as_diffusers_does(tmp_path: Path) -> None:
    outdated = build_checkpoint(tmp_path / "outdated", steps_offset=0)
    with pytest.warns(FutureWarning, match="steps_offset"):
        sides = Sides(outdated)
    specs = [*specs_of(0, None, sides.pipeline.family), *specs_of(1, "ddim", sides.pipeline.family)]
    compared = sides.compare(specs, sides.render(specs, slots=4))
    assert all(parity.holds for parity in compared.values()), compared

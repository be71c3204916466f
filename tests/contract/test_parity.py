"""A request's picture is the one diffusers' own pipeline draws with the same seed, whatever shares its forwards.

Every family, every sampler its kind of model has. Random weights, float32 on the CPU, one thread; pictures are compared
before they are rounded to 8 bits.
"""

import copy
import random
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from farm.specs.samplers import SAMPLERS, find_sampler
from farm.specs.spec import RenderSpec
from tests.checkpoints import build_checkpoint, build_flux, build_sd3, build_sdxl
from workers.engine import decoder
from workers.engine.engine import Engine
from workers.models.pins import Pins
from workers.pipelines import load
from workers.render.request import RenderRequest

TOLERANCE = 1e-5
MAGNIFIED_TOLERANCE = 5e-5
"""Of v-prediction, of Stable Diffusion 3 in shared forwards, and of DDIM that clips. Kernels for more rows, and for the
farm's channels-last convolutions, round otherwise than diffusers' own; guided 7.5 times, or clipped, untrained models
magnify float32's last bits, to 3.4e-5, 1.7e-5 and 2.2e-5. 1/80 of a step of 8 bits."""
CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "sd": build_checkpoint,
    "sd-v": partial(build_checkpoint, prediction_type="v_prediction"),
    "sdxl": build_sdxl,
    "sd3": build_sd3,
    "sd3-without-t5": partial(build_sd3, t5=False),
    "flux": build_flux,
}
LONG = ("sd-v", "sdxl")
"""With all samplers, of which those of Stable Diffusion say nearly as much: only in `make test-long`."""
SOME = {"sdxl-some": "sdxl"}
"""With every third sampler, in its place."""
PROMPTS = ("a red circle on a blue square", "", "an OLD house, über the water", "a long prompt, " * 8, "two cats")
STEPS = ((1, 2), (3, 2), (5, 2), (1, 4))


def specs_of(place: int, sampler: str | None, family: str) -> list[RenderSpec]:
    """A sampler with and without guidance and negative prompt, in an odd and an even number of steps.

    What else a spec may ask of its family is strewn among them.
    """
    diffusion, flux = family.startswith("StableDiffusion") and "3" not in family, family == "FluxPipeline"
    specs = []
    choices = list(product((1, 7.5), ("", "blurry, low"), STEPS[place % len(STEPS)]))
    for guidance_scale, negative_prompt, steps in choices:
        # A negative prompt that guides nothing makes no other picture: its reference is drawn once.
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
                eta=0.5 if (place + index) % 2 else 0,
                num_inference_steps=steps,
                width=96 if large else 64,
                height=80 if large else 64,
                seed=100 * place + index,
                scheduler=sampler,
            )
        )
    return specs


class Reference:
    """diffusers' own pipeline over a checkpoint, one picture at a time; each is drawn once."""

    def __init__(self, folder: Path) -> None:
        index = diffusers.DiffusionPipeline.load_config(folder)
        left_out = {part: None for part, entry in index.items() if entry == [None, None]}
        self.pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **left_out)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.encode_prompt = cache(self.pipe.encode_prompt)
        self.scheduler = self.pipe.scheduler
        self.drawn: dict[RenderSpec, np.ndarray] = {}

    def __call__(self, spec: RenderSpec) -> np.ndarray:
        if spec.guidance_scale <= 1 and not isinstance(self.pipe, diffusers.FluxPipeline):
            spec = spec.model_copy(update={"negative_prompt": ""})
        if spec not in self.drawn:
            self.drawn[spec] = self.draw(spec)
        return self.drawn[spec]

    @torch.inference_mode()
    def draw(self, spec: RenderSpec) -> np.ndarray:
        generator = torch.Generator("cpu").manual_seed(spec.seed)
        kwargs: dict[str, Any] = {"prompt": spec.prompt, "clip_skip": spec.clip_skip}
        kind, recipe = "diffusion" if hasattr(self.pipe, "unet") else "flow", None
        if spec.scheduler is None:
            self.pipe.scheduler = type(self.scheduler).from_config(self.scheduler.config)
        else:
            recipe = getattr(find_sampler(spec.scheduler), kind)
            own = self.scheduler.config
            self.pipe.scheduler = getattr(diffusers, recipe.class_name).from_config(own, **recipe.over(own))
        if kind == "diffusion":
            kwargs |= {"guidance_rescale": spec.guidance_rescale, "eta": spec.eta}
        elif recipe is not None and recipe.draws_noise:
            # The pipelines of flow models hand no generator to a step: it would draw from torch's global one.
            self.pipe.scheduler.step = partial(self.pipe.scheduler.step, generator=generator)
        if isinstance(self.pipe, diffusers.FluxPipeline):
            kwargs |= {"true_cfg_scale": spec.true_cfg_scale}
            del kwargs["clip_skip"]
        if isinstance(self.pipe, diffusers.StableDiffusionPipeline) and spec.clip_skip:
            kwargs |= {"prompt": None, "prompt_embeds": self.embed(spec.prompt, spec.clip_skip), "clip_skip": None}
        picture: np.ndarray = self.pipe(
            negative_prompt=spec.negative_prompt or None,
            width=spec.width,
            height=spec.height,
            num_inference_steps=spec.num_inference_steps,
            guidance_scale=spec.guidance_scale,
            generator=generator,
            output_type="np",
            **kwargs,
        ).images[0]
        return picture

    def embed(self, text: str, clip_skip: int) -> torch.Tensor:
        """By a text encoder that has no such layers: diffusers 0.42 can't skip them with transformers 5."""
        encoder = copy.deepcopy(self.pipe.text_encoder)
        encoder.encoder.layers = encoder.encoder.layers[:-clip_skip]
        tokens = self.pipe.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt")
        return encoder(tokens.input_ids)[0]


class Parity:
    """A checkpoint in the farm's hands and in diffusers', with what an engine never shows."""

    def __init__(self, folder: Path, every: int = 1) -> None:
        self.reference = Reference(folder)
        self.pipeline: Any = load(str(folder), torch.device("cpu"), torch.float32)
        self.pictures: dict[str, np.ndarray] = {}
        self.forwards: list[list[tuple[str | None, int, int]]] = []
        """Of each forward: its requests' samplers, steps and rows."""
        self._denoise = self.pipeline.denoise
        self.pipeline.denoise = self.denoise
        kind, family = self.pipeline.samplers, self.pipeline.family
        recipes = {name: getattr(sampler, kind) for name, sampler in SAMPLERS.items()}
        fitting = [name for name, recipe in recipes.items() if recipe and recipe.fits(family)]
        self.samplers = [None, *fitting[::every]]
        self.specs = [spec for place, name in enumerate(self.samplers) for spec in specs_of(place, name, family)]

    def denoise(self, requests: list[RenderRequest], rows: int | None = None) -> torch.Tensor:
        self.forwards.append([(request.spec.scheduler, request.step_index, request.rows) for request in requests])
        return self._denoise(requests, rows)

    def render(self, specs: list[RenderSpec], slots: int, **options: bool) -> list[np.ndarray]:
        """The float pictures of the specs, from an engine with that many slots."""
        self.forwards.clear()
        engine = Engine(Pins.of({"tiny": self.pipeline}), slots=slots, line=len(specs), **options)
        engine.start()
        rendered = decoder.rendered

        def watched(request: RenderRequest, pipeline: Any, picture: torch.Tensor, *others: Any) -> Any:
            self.pictures[request.id] = picture.permute(1, 2, 0).numpy()
            return rendered(request, pipeline, picture, *others)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder, "rendered", watched)
            futures = [engine.submit(RenderRequest(str(place), spec)) for place, spec in enumerate(specs)]
            for future in futures:
                future.result(timeout=60)
            engine.stop()
        return [self.pictures[str(place)] for place in range(len(specs))]

    def tolerance(self, *, shared: bool) -> float:
        predicts_v = self.reference.scheduler.config.get("prediction_type") == "v_prediction"
        magnifies = predicts_v or (shared and self.pipeline.family == "StableDiffusion3Pipeline")
        return MAGNIFIED_TOLERANCE if magnifies else TOLERANCE

    def apart(self, specs: list[RenderSpec], pictures: list[np.ndarray]) -> dict[str, float]:
        """The largest difference in [0, 1] to diffusers' pictures, by sampler."""
        worst: dict[str, float] = {}
        for spec, picture in zip(specs, pictures, strict=True):
            theirs, sampler = self.reference(spec), spec.scheduler or "own"
            assert picture.shape == theirs.shape
            worst[sampler] = max(worst.get(sampler, 0), float(np.abs(picture - theirs).max()))
        return worst

    @torch.inference_mode()
    def finish(self, request: RenderRequest, forwards: int = 10**6) -> RenderRequest:
        """Denoise a request without an engine, to its end or up to so many forwards."""
        self.pipeline.plan(request)
        self.pipeline.encode(request)
        while not request.denoised and request.step_index < forwards:
            self.pipeline.step([request], self._denoise([request]))
            request.step_index += 1
        return request


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    # Models this small gain nothing from more, and on a busy machine threads that wait for each other cost 100 times.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in (*CHECKPOINTS, *SOME)],
)
def parity(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Parity:
    some = SOME.get(request.param)
    build = CHECKPOINTS[some or request.param]
    return Parity(build(tmp_path_factory.mktemp(request.param)), every=3 if some else 1)


def test_a_request_alone_is_the_pipelines_picture(parity: Parity) -> None:
    worst = parity.apart(parity.specs, parity.render(parity.specs, slots=1))
    print(f"{len(parity.specs)} requests, {len(parity.forwards)} forwards, max abs {max(worst.values()):.1e}")
    assert {len(requests) for requests in parity.forwards} == {1}
    assert max(worst.values()) <= parity.tolerance(shared=False), worst


def test_neighbours_do_not_show(parity: Parity) -> None:
    specs = random.Random(0).sample(parity.specs, len(parity.specs))
    worst = parity.apart(specs, parity.render(specs, slots=12))
    print(f"{len(specs)} requests, {len(parity.forwards)} forwards, max abs {max(worst.values()):.1e}")
    assert max(worst.values()) <= parity.tolerance(shared=True), worst
    shared = [requests for requests in parity.forwards if len(requests) > 1]
    assert len(shared) > len(parity.forwards) / 2
    assert any(len({sampler for sampler, _, _ in requests}) >= 5 for requests in shared)
    assert any(len({step for _, step, _ in requests}) >= 3 for requests in shared)
    assert any({rows for _, _, rows in requests} == {1, 2} for requests in shared)


def test_pictures_of_other_specs_are_further_apart_than_the_tolerance(parity: Parity) -> None:
    spec = RenderSpec(prompt="two cats", negative_prompt="low", num_inference_steps=4, seed=1, width=64, height=64)
    spec = spec.model_copy(update={"true_cfg_scale": 2.0})
    others = {"prompt": "a dog", "negative_prompt": "high", "num_inference_steps": 3, "guidance_scale": 3.0, "seed": 2}
    for name, value in others.items():
        other = parity.reference(spec.model_copy(update={name: value}))
        assert np.abs(parity.reference(spec) - other).max() > 20 * MAGNIFIED_TOLERANCE, name


def test_a_resumed_request_draws_the_same_bytes(parity: Parity) -> None:
    for place, sampler in enumerate(parity.samplers):
        spec = RenderSpec(
            prompt="x", num_inference_steps=4, seed=place, scheduler=sampler, eta=0.5, width=64, height=64
        )
        whole = parity.finish(RenderRequest("whole", spec))
        begun = parity.finish(RenderRequest("begun", spec), forwards=1 + place % 3)
        written = begun.snapshot(parity.pipeline.sha256)
        before = written.latents.clone()
        assert torch.equal(parity.finish(RenderRequest("resumed", spec, resume=written)).latents, whole.latents), (
            sampler
        )
        assert torch.equal(written.latents, before)


def test_a_deterministic_request_draws_the_same_bytes_among_any_neighbours(parity: Parity) -> None:
    specs = random.Random(1).sample([spec for spec in parity.specs if spec.width == 64], 16)
    alone = parity.render(specs, slots=1, deterministic=True)
    order = random.Random(2).sample(range(len(specs)), len(specs))
    beside = parity.render([specs[place] for place in order], slots=8, deterministic=True)
    for place, picture in zip(order, beside, strict=True):
        assert np.array_equal(picture, alone[place]), specs[place]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Parity:
    """A checkpoint whose config makes PNDM take Runge-Kutta steps and DDIM clip: no table holds either."""
    return Parity(build_sdxl(tmp_path_factory.mktemp("objects"), skip_prk_steps=False, clip_sample=True))


@pytest.mark.parametrize("sampler", ["pndm", "ddim"])
def test_a_sampler_that_is_no_table_is_stepped_as_the_object_it_is(objects: Parity, sampler: str) -> None:
    specs = [
        RenderSpec(prompt="x", num_inference_steps=steps, seed=1, scheduler=sampler, eta=0.5, width=64, height=64)
        for steps in (5, 6)
    ]
    for slots in (1, 2):
        assert max(objects.apart(specs, objects.render(specs, slots)).values()) <= MAGNIFIED_TOLERANCE
    whole = objects.finish(RenderRequest("whole", specs[0]))
    assert whole.scheduler is not None
    for forwards in range(1, len(whole.sampling.timesteps)):
        written = objects.finish(RenderRequest("begun", specs[0]), forwards).snapshot(objects.pipeline.sha256)
        resumed = objects.finish(RenderRequest("resumed", specs[0], resume=written))
        assert torch.equal(resumed.latents, whole.latents)


def test_an_outdated_scheduler_config_is_mended_as_diffusers_does(tmp_path: Path) -> None:
    outdated = build_checkpoint(tmp_path / "outdated", steps_offset=0)
    with pytest.warns(FutureWarning, match="steps_offset"):
        parity = Parity(outdated)
    specs = [*specs_of(0, None, parity.pipeline.family), *specs_of(1, "ddim", parity.pipeline.family)]
    assert max(parity.apart(specs, parity.render(specs, slots=4)).values()) <= TOLERANCE

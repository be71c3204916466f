"""A request's picture is the one `StableDiffusionPipeline` draws with the same seed, whatever shares its forwards.

Random weights, float32 on the CPU; pictures are compared before they are rounded to 8 bits.
"""

import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from farm.samplers import SAMPLERS, find_sampler
from farm.spec import RenderSpec
from tests.checkpoints import build_checkpoint
from workers.engine import Engine
from workers.pins import Pins
from workers.pipelines import load
from workers.request import RenderRequest

TOLERANCE = 1e-5
V_TOLERANCE = 5e-5
"""Of shared forwards with v-prediction: kernels round otherwise for more rows, and an untrained UNet's v, guided 7.5
times, magnifies that. 1/80 of a step of 8 bits."""
PROMPTS = (
    "a red circle on a blue square",
    "",
    "an OLD house, über the water",
    "a very long prompt, " * 6,
    "two cats",
)


def specs_of(sampler: str | None) -> list[RenderSpec]:
    """A sampler with and without guidance and negative prompt, each with other prompts, seeds and steps."""
    place = list(SAMPLERS).index(sampler) if sampler else 0
    return [
        RenderSpec(
            prompt=PROMPTS[(place + index) % len(PROMPTS)],
            negative_prompt=negative_prompt,
            guidance_scale=guidance_scale,
            num_inference_steps=1 + (place + 3 * index) % 7,
            seed=100 * place + index,
            scheduler=sampler,
        )
        for index, (guidance_scale, negative_prompt) in enumerate(product((1, 7.5), ("", "blurry, low")))
    ]


class Reference:
    """diffusers' own pipeline over a checkpoint, one picture at a time."""

    def __init__(self, folder: Path) -> None:
        self.pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
        self.pipe.set_progress_bar_config(disable=True)
        self.scheduler = self.pipe.scheduler
        self.drawn: dict[RenderSpec, np.ndarray] = {}

    def __call__(self, spec: RenderSpec) -> np.ndarray:
        if spec not in self.drawn:
            sampler = find_sampler(spec.scheduler) if spec.scheduler else None
            kind = getattr(diffusers, sampler.class_name) if sampler else type(self.scheduler)
            self.pipe.scheduler = kind.from_config(self.scheduler.config, **(sampler.config if sampler else {}))
            self.drawn[spec] = self.pipe(
                spec.prompt,
                negative_prompt=spec.negative_prompt or None,
                width=spec.width,
                height=spec.height,
                num_inference_steps=spec.num_inference_steps,
                guidance_scale=spec.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(spec.seed),
                output_type="np",
            ).images[0]
        return self.drawn[spec]


class Watched:
    """A checkpoint in the farm's hands, with what its engine never shows: float pictures, and who shared forwards."""

    def __init__(self, folder: Path) -> None:
        self.pipeline: Any = load(str(folder), torch.device("cpu"), torch.float32)
        self.pictures: dict[str, np.ndarray] = {}
        self.forwards: list[list[RenderRequest]] = []
        self._decode, self._denoise = self.pipeline.decode, self.pipeline.denoise
        self.pipeline.decode, self.pipeline.denoise = self.decode, self.denoise

    def denoise(self, requests: list[RenderRequest]) -> list[torch.Tensor]:
        self.forwards.append(requests)
        return self._denoise(requests)

    def decode(self, requests: list[RenderRequest]) -> torch.Tensor:
        decoded = self._decode(requests)
        for request, picture in zip(requests, decoded, strict=True):
            self.pictures[request.id] = picture.permute(1, 2, 0).numpy()
        return decoded

    def render(self, specs: list[RenderSpec], slots: int) -> list[np.ndarray]:
        """The float pictures of the specs, from an engine with that many slots."""
        engine = Engine(Pins({"tiny": self.pipeline}), slots=slots, line=len(specs))
        engine.start()
        futures = [engine.submit(RenderRequest(str(index), spec)) for index, spec in enumerate(specs)]
        for future in futures:
            future.result(timeout=60)
        engine.stop()
        return [self.pictures[str(index)] for index in range(len(specs))]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    # Models this small gain nothing from more, and on a busy machine threads that wait for each other cost 100 times.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("epsilon"))


@pytest.fixture(scope="module")
def v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("v"), prediction_type="v_prediction")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture
def watched(folder: Path) -> Watched:
    return Watched(folder)


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of two pictures in [0, 1]."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize("sampler", [None, *SAMPLERS])
def test_a_request_alone_is_the_pipelines_picture(sampler: str | None, watched: Watched, reference: Reference) -> None:
    specs = specs_of(sampler)
    for spec, picture in zip(specs, watched.render(specs, slots=1), strict=True):
        assert apart(picture, reference(spec)) <= TOLERANCE, spec
    assert {len(requests) for requests in watched.forwards} == {1}


def test_neighbours_do_not_show(watched: Watched, reference: Reference) -> None:
    specs = [spec for sampler in SAMPLERS for spec in specs_of(sampler)]
    wide = [spec.model_copy(update={"width": 96, "height": 72}) for spec in specs[::10]]
    specs += wide
    random.Random(0).shuffle(specs)
    pictures = watched.render(specs, slots=8)
    differences = [apart(picture, reference(spec)) for spec, picture in zip(specs, pictures, strict=True)]
    print(f"{len(specs)} requests, {len(watched.forwards)} forwards, max abs {max(differences):.1e}")
    assert max(differences) <= TOLERANCE
    shared = [requests for requests in watched.forwards if len(requests) > 1]
    assert len(shared) > len(watched.forwards) / 2
    assert any(len({request.spec.scheduler for request in requests}) >= 5 for requests in shared)
    assert any(len({request.step_index for request in requests}) >= 5 for requests in shared)
    assert any({request.guided for request in requests} == {True, False} for requests in shared)


def test_a_checkpoint_that_predicts_v_is_the_pipelines_picture(v_folder: Path) -> None:
    watched, reference = Watched(v_folder), Reference(v_folder)
    specs = [specs_of(sampler)[-1] for sampler in (None, *SAMPLERS)]
    for slots, tolerance in ((1, TOLERANCE), (8, V_TOLERANCE)):
        for spec, picture in zip(specs, watched.render(specs, slots), strict=True):
            assert apart(picture, reference(spec)) <= tolerance, spec


def test_pictures_of_other_specs_are_further_apart_than_the_tolerance(reference: Reference) -> None:
    for sampler in SAMPLERS:
        plain, _, guided, negative = (reference(spec) for spec in specs_of(sampler))
        other = reference(specs_of(sampler)[3].model_copy(update={"num_inference_steps": 9}))
        assert apart(plain, guided) > 100 * TOLERANCE
        assert apart(guided, negative) > 100 * TOLERANCE
        assert apart(negative, other) > 100 * TOLERANCE


def test_an_outdated_scheduler_config_is_mended_as_diffusers_does(tmp_path: Path) -> None:
    outdated = build_checkpoint(tmp_path / "outdated", steps_offset=0)
    with pytest.warns(FutureWarning, match="steps_offset"):
        reference = Reference(outdated)
    with pytest.warns(FutureWarning, match="steps_offset"):
        watched = Watched(outdated)
    specs = [*specs_of(None), *specs_of("ddim")]
    for spec, picture in zip(specs, watched.render(specs, slots=4), strict=True):
        assert apart(picture, reference(spec)) <= TOLERANCE

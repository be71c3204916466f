"""Which pictures are decoded together, and how errors in decoding are handled."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue

import pytest
import torch

from farm.errors import FarmError, RenderError
from tests.gated import SOON, pixel, request
from workers.engine.decoder import Decoder
from workers.pipelines.null import NullPipeline
from workers.render.request import Rendered, RenderRequest


@dataclass(frozen=True)
class Waiting(NullPipeline):
    """A null pipeline whose decoding waits for the test."""

    decoded: list[torch.Size] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    decoding: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.decoded.append(latents.shape)
        self.decoding.set()
        assert self.go_on.wait(SOON)
        if self.errors:
            raise self.errors.pop(0)
        return super().decode(latents)


Outcomes = SimpleQueue[tuple[str, Rendered | FarmError]]


@pytest.fixture
def done() -> Outcomes:
    return SimpleQueue()


@pytest.fixture
def lost() -> list[Exception]:
    return []


@pytest.fixture
def decoder(done: Outcomes, lost: list[Exception]) -> Iterator[Decoder]:
    decoder = Decoder(lambda one, outcome: done.put((one.id, outcome)), lost.append)
    yield decoder
    decoder.side.close()


def denoised(pipeline: NullPipeline, one: RenderRequest, *, deterministic: bool = False) -> RenderRequest:
    pipeline.plan(one)
    pipeline.encode(one)
    one.deterministic = deterministic
    while not one.denoised:
        pipeline.step([one], pipeline.denoise([one]))
        one.step_index += 1
    return one


def test_what_waits_of_one_shape_is_decoded_at_once_and_deterministic_ones_alone(
    decoder: Decoder, done: Outcomes
) -> None:
    pipeline = Waiting()
    decoder.add(pipeline, denoised(pipeline, request("first", seed=0)))
    assert pipeline.decoding.wait(SOON)
    decoder.add(pipeline, denoised(pipeline, request("a", seed=1)))
    decoder.add(pipeline, denoised(pipeline, request("fixed", seed=2), deterministic=True))
    decoder.add(pipeline, denoised(pipeline, request("b", seed=3)))
    decoder.add(pipeline, denoised(pipeline, request("wide", seed=4, width=128)))
    decoder.add(pipeline, denoised(pipeline, request("fixed too", seed=5), deterministic=True))
    pipeline.go_on.set()
    outcomes = [done.get(timeout=SOON) for _ in range(6)]
    assert [name for name, _ in outcomes] == ["first", "a", "b", "fixed", "wide", "fixed too"]
    assert [shape[0] for shape in pipeline.decoded] == [1, 2, 1, 1, 1]
    colours = [outcome.image.getpixel((0, 0)) for _, outcome in outcomes if isinstance(outcome, Rendered)]
    assert colours == [pixel(seed) for seed in (0, 1, 3, 2, 4, 5)]


def test_pictures_that_fail_together_are_tried_alone_and_only_the_culprit_fails(
    decoder: Decoder, done: Outcomes, lost: list[Exception]
) -> None:
    pipeline = Waiting()
    decoder.add(pipeline, denoised(pipeline, request("first")))
    assert pipeline.decoding.wait(SOON)
    pipeline.errors[:] = [KeyError("first"), KeyError("together"), KeyError("a")]
    for name in "ab":
        decoder.add(pipeline, denoised(pipeline, request(name)))
    pipeline.go_on.set()
    outcomes = dict(done.get(timeout=SOON) for _ in range(3))
    assert isinstance(outcomes["first"], RenderError)
    assert isinstance(outcomes["a"], RenderError)
    assert isinstance(outcomes["b"], Rendered)
    assert lost == []


def test_a_lost_device_is_reported_and_no_picture_is(decoder: Decoder, done: Outcomes, lost: list[Exception]) -> None:
    pipeline = Waiting()
    pipeline.errors.append(torch.AcceleratorError("device-side assert"))
    pipeline.go_on.set()
    decoder.add(pipeline, denoised(pipeline, request("a")))
    decoder.side.run(pipeline.device, lambda: None)  # runs after the decoding
    assert [type(error) for error in lost] == [torch.AcceleratorError]
    assert done.empty()

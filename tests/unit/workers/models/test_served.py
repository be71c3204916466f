"""What a worker reports about its models and the memory of its device."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from farm.errors import ModelUnavailable
from farm.jobs.served_models import DeviceMemory, MemoryLimit, ServedModel
from farm.specs.guidance import UNGUIDED, Guidance
from farm.specs.spec import RenderSpec
from workers.models import served
from workers.models.pins import Pins
from workers.models.served import Served
from workers.pipelines.null import NullPipeline

GIB = 2**30
GUIDED = Guidance("guidance_scale")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The used bytes of a device with 80 GiB, which tests may change."""
    now = [20 * GIB]
    monkeypatch.setattr(served, "memory", lambda _: (now[0], 80 * GIB))
    return now


def outlined(name: str) -> NullPipeline:
    return NullPipeline(guidance=GUIDED)


def worker(
    pipeline: NullPipeline | None = None, outline: Callable[[str], NullPipeline] = outlined
) -> tuple[Served, Any]:
    """Return a worker with one loaded model, `tiny`, and one that it has never loaded, `other`."""
    pipelines = {"tiny": pipeline or NullPipeline()}
    pins = Pins.of(pipelines)
    pins.names = ("tiny", "other")
    opener: Any = SimpleNamespace(loaded={}, outline=outline)
    return Served(pins, opener, torch.device("cpu")), opener


def spec(size: int | None, guidance_scale: float = 7.5) -> RenderSpec:
    return RenderSpec(prompt="x", model="tiny", width=size, height=size, guidance_scale=guidance_scale)


@pytest.mark.usefixtures("used")
def test_it_says_which_models_are_loaded_when_they_are_guided_and_how_much_memory_is_used() -> None:
    said, _ = worker()
    assert said.models == (
        ServedModel("tiny", loaded=True, guidance=UNGUIDED),
        ServedModel("other", guidance=GUIDED),
    )
    assert said.memory == DeviceMemory(20 * GIB, 80 * GIB)


def test_a_small_change_of_the_memory_used_changes_nothing(used: list[int]) -> None:
    said, _ = worker()
    used[0] += GIB // 8
    said.refresh()
    assert said.memory == DeviceMemory(20 * GIB, 80 * GIB)
    used[0] += GIB
    said.refresh()
    assert said.memory is not None
    assert said.memory.used > 20 * GIB


def test_a_device_that_does_not_tell_its_memory_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "memory", lambda _: None)
    said, _ = worker()
    assert (said.memory, said.models[0].limit) == (None, None)


@pytest.mark.usefixtures("used")
def test_a_model_that_is_loaded_later_keeps_its_limit() -> None:
    said, opener = worker()
    said.forbid(spec(128))
    opener.loaded["tiny"] = ServedModel("tiny", loaded=True, sha256="e" * 64, guidance=UNGUIDED)
    said.refresh()
    assert said.models[0].sha256 == "e" * 64
    assert said.models[0].limit == MemoryLimit(128**2 - 1, 3, UNGUIDED)


@pytest.mark.usefixtures("used")
def test_a_model_that_can_not_be_traced_has_no_limit_and_no_guidance() -> None:
    def fail(name: str) -> NullPipeline:
        raise ModelUnavailable(f"{name} is away")

    said, _ = worker(outline=fail)
    assert said.models[1] == ServedModel("other")


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize(
    ("failed", "guidance", "limit"),
    [
        ([spec(128)], GUIDED, (2 * 128**2 - 1, 7)),
        ([spec(128)], UNGUIDED, (128**2 - 1, 3)),
        ([spec(None)], GUIDED, (2 * 64**2 - 1, 1)),  # the model's native size: without guidance it fits
        ([spec(None, 1.0)], GUIDED, (64**2 - 1, 0)),
        ([spec(None), spec(128)], GUIDED, (2 * 64**2 - 1, 1)),
        ([spec(128), spec(None)], GUIDED, (2 * 64**2 - 1, 1)),
    ],
)
def test_a_picture_that_ran_out_of_memory_alone_is_refused_and_larger_ones_too(
    failed: list[RenderSpec], guidance: Guidance, limit: tuple[int, int]
) -> None:
    said, _ = worker(NullPipeline(guidance=guidance))
    for each in failed:
        said.forbid(each)
    assert said.models[0].limit == MemoryLimit(*limit, guidance)
    assert not any(said.allows(each) for each in failed)
    assert said.allows(spec(64, 1.0)) == (limit[0] >= 64**2)
    assert said.models[1].limit is None

"""What a worker publishes of its models."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from farm.errors import DatabaseUnavailable
from farm.jobs.memory import MOST, OWN_ROWS, Room, room_of
from farm.jobs.records import WorkerInfo
from farm.specs.spec import RenderSpec
from workers.models.pins import Pins
from workers.pipelines.null import NullPipeline
from workers.service.published_models import PublishedModels


def spec(size: int | None, guidance_scale: float = 7.5) -> RenderSpec:
    return RenderSpec(prompt="x", model="tiny", width=size, height=size, guidance_scale=guidance_scale)


@pytest.mark.parametrize(
    ("before", "failed", "room"),
    [
        ({}, spec(128), Room(2 * 128**2 - 1, 7)),
        ({}, spec(None), Room(2 * 64**2 - 1, 1)),  # of the model's own size: a row fits, and no two
        ({}, spec(None, 1.0), Room(64**2 - 1, 0)),
        ({MOST: 5000, OWN_ROWS: 1}, spec(128), Room(5000, 1)),
        ({MOST: 50_000, OWN_ROWS: 2}, spec(None), Room(2 * 64**2 - 1, 1)),
    ],
)
def test_what_failed_alone_does_not_fit_and_nothing_larger(
    before: dict[str, int], failed: RenderSpec, room: Room
) -> None:
    published: list[WorkerInfo] = []
    store: Any = SimpleNamespace(describe=published.append)
    opener: Any = SimpleNamespace(loaded={})
    info = WorkerInfo("w1@host", "cpu", "float32", 4, "1")
    models = PublishedModels(store, info, Pins.of({"tiny": NullPipeline()}), opener, torch.device("cpu"))
    models.info = replace(info, models=({"name": "other"}, {"name": "tiny", **before}))
    assert models.has_room(failed) or before
    models.no_room(failed)
    assert not models.has_room(failed)
    (other, tiny) = published[0].models
    assert (room_of(other), room_of(tiny)) == (None, room)


def test_an_update_that_failed_is_made_later_and_one_without_news_is_not_made() -> None:
    answers, published = iter([DatabaseUnavailable("away"), None, None]), list[WorkerInfo]()

    def describe(info: WorkerInfo) -> None:
        if error := next(answers):
            raise error
        published.append(info)

    store: Any = SimpleNamespace(describe=describe)
    opener: Any = SimpleNamespace(loaded={})
    info = WorkerInfo("w1@host", "cpu", "float32", 4, "1")
    models = PublishedModels(store, info, Pins.of({"tiny": NullPipeline()}), opener, torch.device("meta"))
    models.publish()
    assert published == []
    models.publish()
    assert published == [models.info]

"""What a worker makes known when one picture alone was too large for its memory."""

from types import SimpleNamespace
from typing import Any

import pytest

from farm.jobs.memory import MOST, OWN_ROWS, Room, room_of
from farm.jobs.records import WorkerInfo
from farm.settings import Settings
from farm.specs.spec import RenderSpec
from workers.models.pins import Pins
from workers.pipelines.null import NullPipeline
from workers.service.worker import Worker


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
    worker: Any = Worker(Settings(database_url="sqlite://", broker_url="", s3_bucket=""), "w1@host")
    told: list[WorkerInfo] = []
    worker.pins = Pins.of({"tiny": NullPipeline()})
    worker.store = SimpleNamespace(workers=SimpleNamespace(describe=told.append))
    worker.info = WorkerInfo("w1@host", "cpu", "float32", 4, "1", ({"name": "other"}, {"name": "tiny", **before}))
    assert worker.has_room(failed) or before
    worker.no_room(failed)
    assert not worker.has_room(failed)
    (other, tiny) = told[0].models
    assert (room_of(other), room_of(tiny)) == (None, room)

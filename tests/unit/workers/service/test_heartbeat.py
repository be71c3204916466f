"""When a worker renews its leases."""

import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from farm.settings import Settings
from workers.service.worker import Worker


def test_a_beat_begins_on_time_though_each_takes_long() -> None:
    worker: Any = Worker(Settings(database_url="sqlite://", broker_url="", s3_bucket="", beat_seconds=0.4), "w1@host")
    worker.engine = SimpleNamespace(failed=None, busy_seconds=0.0)
    began: list[float] = []

    def beat(_mine: object) -> None:
        began.append(time.monotonic())
        time.sleep(0.3)  # as over a slow network
        if len(began) == 4:
            worker._stopped.set()

    worker._beat, worker._restate = beat, lambda: None
    worker._beat_on()
    assert 0.3 < min(later - earlier for earlier, later in pairwise(began)) < 0.6

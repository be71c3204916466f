"""When a periodic call is made."""

import threading
import time
from itertools import pairwise

import pytest

from farm.runtime.periodic import Periodic

SOON = 30.0


def test_a_call_begins_on_time_though_each_takes_long() -> None:
    began: list[float] = []
    enough = threading.Event()

    def call() -> None:
        began.append(time.monotonic())
        if len(began) == 4:
            enough.set()
        time.sleep(0.3)

    periodic = Periodic("test", 0.4, call)
    periodic.start()
    assert enough.wait(SOON)
    periodic.stop()
    assert 0.3 < min(later - earlier for earlier, later in pairwise(began)) < 0.6


def test_a_call_that_raises_is_logged_and_made_again(caplog: pytest.LogCaptureFixture) -> None:
    calls, enough = [], threading.Event()

    def call() -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            enough.set()
        raise RuntimeError("no way")

    periodic = Periodic("heartbeat", 0.01, call)
    periodic.start()
    assert enough.wait(SOON)
    periodic.stop()
    assert caplog.messages[:2] == ["heartbeat failed"] * 2


def test_after_a_stop_no_call_is_made() -> None:
    calls: list[int] = []
    periodic = Periodic("test", 3600.0, lambda: calls.append(1))
    periodic.start()
    periodic.stop(SOON)
    assert (calls, periodic._thread.is_alive()) == ([], False)

"""When a periodic call is made."""

import threading

import pytest

from farm.runtime.periodic import Periodic

SOON = 30.0


class Stopped(threading.Event):
    """An event that is set after some waits; each wait moves a clock."""

    def __init__(self, waits: int) -> None:
        super().__init__()
        self.now, self.pauses, self._waits = 1000.0, list[float](), waits

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.pauses.append(timeout)
        self.now += timeout
        return len(self.pauses) == self._waits


@pytest.mark.parametrize(("took", "pause"), [(0.0, 8.0), (6.0, 2.0), (7.0, 2.0), (100.0, 2.0)])
def test_calls_are_timed_from_start_to_start_with_a_pause_of_a_quarter_at_least(took: float, pause: float) -> None:
    stopped = Stopped(waits=4)

    def call() -> None:
        stopped.now += took

    periodic = Periodic("test", 8.0, call, clock=lambda: stopped.now, stopped=stopped)
    periodic.start()
    periodic._thread.join(SOON)
    assert stopped.pauses == [8.0, pause, pause, pause]


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

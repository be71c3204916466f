"""How long a call is repeated during an outage."""

import threading

import pytest

from farm.errors import BadRequest, DatabaseUnavailable
from farm.runtime import retrying
from farm.runtime.retrying import insist


class Clock:
    """Replaces `time`, and the events that `insist` waits on: pauses take no time."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def Event(self) -> "Clock":  # noqa: N802 - threading's own name
        return self

    def is_set(self) -> bool:
        return False

    def wait(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retrying, "time", clock)
    monkeypatch.setattr(retrying, "threading", clock)
    return clock


class Away:
    """A service that fails the first calls."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise DatabaseUnavailable("away")
        return "here"


def test_a_call_is_repeated_until_the_service_is_back(clock: Clock) -> None:
    assert insist(Away(3), seconds=60) == "here"
    assert len(clock.pauses) == 3
    assert clock.pauses == sorted(clock.pauses)


def test_a_call_is_not_repeated_for_ever_and_not_in_a_hurry(clock: Clock) -> None:
    service = Away(10**6)
    with pytest.raises(DatabaseUnavailable):
        insist(service, seconds=60)
    assert 60 <= clock.now < 70
    assert service.calls < 40


def test_another_error_is_raised_at_once(clock: Clock) -> None:
    def fails() -> None:
        raise BadRequest("no such sampler")

    with pytest.raises(BadRequest):
        insist(fails, seconds=60)
    assert clock.pauses == []


def test_a_stop_ends_the_pause_and_allows_one_more_call() -> None:
    stop, calls = threading.Event(), list[int]()

    def call() -> None:
        calls.append(1)
        threading.Timer(0.05, stop.set).start()
        raise DatabaseUnavailable("away")

    with pytest.raises(DatabaseUnavailable):
        insist(call, seconds=3600, stop=stop)
    assert len(calls) == 2

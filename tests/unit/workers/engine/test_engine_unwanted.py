"""A request cancelled during its decoding, or before it, ends when the device has stopped working for it."""

import threading

import pytest

from farm.errors import RenderCancelled
from tests.gated import SOON, Gated, request
from workers.engine.engine import Engine


class Gate:
    """A decoder that waits for the test."""

    def __init__(self, gated: Gated) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        gated.faults["decode"] = self._wait

    def _wait(self, _: object) -> None:
        self.begun.set()
        assert self.go.wait(SOON)


def test_one_that_is_cancelled_while_it_is_decoded_ends_when_it_is_decoded(engine: Engine, gated: Gated) -> None:
    gate = Gate(gated)
    future = engine.submit(request("a", steps=1))
    gated.allow()
    assert gate.begun.wait(SOON)
    assert engine.cancel("a")
    assert not future.done()
    assert engine.cancel("a")  # every heartbeat repeats the cancellation
    gate.go.set()
    with pytest.raises(RenderCancelled):
        future.result(SOON)
    assert not engine.cancel("a")


def test_one_that_is_cancelled_before_it_is_decoded_never_is(engine: Engine, gated: Gated) -> None:
    gate = Gate(gated)
    long = engine.submit(request("long", steps=5))  # keeps the loop busy, so that it does not decode itself
    assert gated.begun() == ["long"]
    first, second = (engine.submit(request(name, steps=steps)) for name, steps in (("first", 1), ("second", 2)))
    assert set(gated.next()) == {"long", "first", "second"}
    assert set(gated.next()) == {"long", "second"}
    assert gate.begun.wait(SOON)
    assert gated.next() == ["long"]
    assert engine.cancel("second")
    with pytest.raises(RenderCancelled):
        second.result(SOON)
    assert not first.done()
    gate.go.set()
    gated.allow()
    assert first.result(SOON)
    assert long.result(SOON)
    assert gated.decoded == [1, 1]

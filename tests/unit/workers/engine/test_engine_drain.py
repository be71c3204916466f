"""Snapshots of a running render, and the state that remains of it when its worker drains."""

import threading
import time
from concurrent.futures import CancelledError, Future, wait

import pytest
import torch

from farm.errors import RenderHandedBack
from tests.gated import SOON, Gated, fail, in_thread, pixel, request, running
from workers.engine.engine import Engine
from workers.outputs import checkpoint
from workers.pipelines.null import NullPipeline
from workers.render.request import Rendered, RequestHandedBack, Snapshot

LONG = 10 * SOON
"""Seconds of a drain that is longer than the tests' timeout: the test passes only if the drain ends early."""


def drain_and_see(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Future[None]:
    """Begin to drain, and wait until the engine hands a request back."""
    seen, hand_back = threading.Event(), engine.hand_back

    def hand_back_and_tell(request_id: str, why: str) -> bool:
        known = hand_back(request_id, why)
        seen.set()
        return known

    monkeypatch.setattr(engine, "hand_back", hand_back_and_tell)
    draining = in_thread(lambda: engine.drain(LONG))
    assert seen.wait(SOON)
    return draining


def handed_back(future: Future[Rendered]) -> Snapshot | None:
    """Return the snapshot with which a request was handed back."""
    error = future.exception(SOON)
    assert isinstance(error, RequestHandedBack)
    return error.snapshot


# --- snapshots


def test_a_look_shows_the_state_after_the_next_step(engine: Engine, gated: Gated) -> None:
    engine.submit(request("a", steps=4))
    gated.begun()
    snapshot = engine.snapshot("a")
    assert not snapshot.done()
    gated.next()
    snapshot = snapshot.result(SOON)
    assert (snapshot.step_index, snapshot.steps_done, snapshot.model_sha256) == (1, 1, gated.sha256)
    assert snapshot.spec == request("a", steps=4).spec
    expected = torch.tensor(pixel(1)) / 255 / 4
    assert torch.allclose(snapshot.latents[0, :, 0, 0], expected, atol=1e-3)


def test_a_look_may_wait_for_a_number_of_steps(engine: Engine, gated: Gated) -> None:
    engine.submit(request("a", steps=5))
    gated.begun()
    later, sooner = engine.snapshot("a", 3), engine.snapshot("a", 2)
    gated.next()
    assert not sooner.done()
    gated.next()
    assert sooner.result(SOON).steps_done == 2
    assert not later.done()
    gated.next()
    assert later.result(SOON).steps_done == 3


@pytest.mark.parametrize("how", ["done", "cancelled", "replaced", "failed"])
def test_a_look_is_cancelled_when_its_request_ends_before(engine: Engine, gated: Gated, how: str) -> None:
    engine.submit(request("a", steps=1))
    gated.begun()
    snapshot = engine.snapshot("a", 5)
    if how == "cancelled":
        engine.cancel("a")
    if how == "replaced":
        engine.submit(request("a"))
    if how == "failed":
        gated.faults["denoise"] = fail(RuntimeError("oops"))
    gated.allow()
    assert wait([snapshot], SOON).done
    with pytest.raises(CancelledError):
        snapshot.result(0)


def test_a_look_at_what_is_not_here_is_cancelled(engine: Engine) -> None:
    snapshot = engine.snapshot("never here")
    assert wait([snapshot], SOON).done
    assert snapshot.cancelled()


def test_a_cancelled_snapshot_does_not_affect_the_render(engine: Engine, gated: Gated) -> None:
    futures = [engine.submit(request("a", steps=3))]
    gated.begun()
    assert engine.snapshot("a").cancel()
    assert engine.snapshot("a", 9).cancel()
    gated.allow()
    assert futures[0].result(SOON).image.getpixel((0, 0)) == pixel(1)


def test_a_snapshot_can_be_drawn_small_or_by_the_decoder(engine: Engine, gated: Gated) -> None:
    engine.submit(request("a", steps=2, width=128))
    gated.begun()
    snapshot = engine.snapshot("a")
    gated.next()
    small, large = engine.preview(snapshot.result(SOON)), engine.preview(snapshot.result(SOON), vae=True)
    assert (small.size, large.size) == ((16, 8), (128, 64))
    half = tuple(value / 2 for value in pixel(1))
    assert small.getpixel((0, 0)) == large.getpixel((5, 5)) == pytest.approx(half, abs=1)


# --- resuming from a snapshot


def snapshot_of(steps_done: int, **spec: object) -> Snapshot:
    gated = Gated()
    with running(gated) as engine:
        engine.submit(request("a", steps=5, **spec))
        snapshot = engine.snapshot("a", steps_done)
        gated.allow()
        return snapshot.result(SOON)


@pytest.mark.parametrize("steps_done", [1, 4])
def test_a_render_goes_on_from_a_snapshot_that_was_written_down(engine: Engine, gated: Gated, steps_done: int) -> None:
    kept = checkpoint.unpack(checkpoint.pack(snapshot_of(steps_done)))
    gated.allow()
    future = engine.submit(request("a", steps=5, resume=kept))
    assert future.result(SOON).image.getpixel((0, 0)) == pixel(1)
    assert len(gated.forwards) == 5 - steps_done


@pytest.mark.parametrize("other", ["spec", "model"])
def test_a_snapshot_of_something_else_is_left_aside_and_told(
    engine: Engine, gated: Gated, caplog: pytest.LogCaptureFixture, other: str
) -> None:
    kept = snapshot_of(3, seed=2 if other == "spec" else 1)
    gated.null = NullPipeline(sha256="1" * 64) if other == "model" else gated.null
    gated.allow()
    future = engine.submit(request("a", steps=5, resume=kept))
    assert future.result(SOON).image.getpixel((0, 0)) == pixel(1)
    assert len(gated.forwards) == 5
    assert "a starts from its first step" in caplog.text


# --- draining


def test_a_drain_hands_back_waiting_requests_at_once_and_finishes_the_rest(engine: Engine, gated: Gated) -> None:
    first = engine.submit(request("running", steps=3))
    gated.begun()
    waiting = engine.submit(request("waiting"))
    draining = in_thread(lambda: engine.drain(SOON))
    assert handed_back(waiting) is None
    with pytest.raises(RenderHandedBack, match="takes no more"):
        engine.submit(request("late"))
    assert not first.done()
    assert not engine._accepting
    gated.allow()
    draining.result(SOON)
    assert isinstance(first.result(0), Rendered)


def test_a_request_that_waits_for_room_in_line_is_handed_back_too(engine: Engine, gated: Gated) -> None:
    engine.submit(request("0"))
    gated.begun()
    for name in "12":
        engine.submit(request(name))
    late = in_thread(lambda: engine.submit(request("3")))
    engine.drain(0)
    with pytest.raises(RenderHandedBack):
        late.result(SOON)


def test_a_preempted_request_is_handed_back_with_its_state(gated: Gated) -> None:
    with running(gated, slots=1) as engine:
        bulk = engine.submit(request("bulk", steps=5))
        gated.begun()
        engine.submit(request("urgent", priority=90, steps=3))
        assert gated.next() == ["urgent"]
        draining = in_thread(lambda: engine.drain(SOON))
        snapshot = handed_back(bulk)
        gated.allow()
        draining.result(SOON)
    assert snapshot is not None
    assert snapshot.steps_done == 1
    with running(again := Gated()) as engine:
        again.allow()
        future = engine.submit(request("bulk", steps=5, resume=snapshot))
        assert future.result(SOON).image.getpixel((0, 0)) == pixel(1)
    assert len(again.forwards) == 4


def test_what_can_not_finish_in_time_is_handed_back_after_its_next_step(
    engine: Engine, gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, short = engine.submit(request("long", steps=1000)), engine.submit(request("short", steps=1000))
    gated.begun()
    while engine.progress()["short"].steps_done < 1:
        gated.next()
    with engine._changed:  # their measured pace: a second per step, and almost nothing
        for request_id, pace in (("long", 1.0), ("short", 1e-6)):
            engine._renders[request_id].request.seconds_per_forward = pace
            engine._renders[request_id].request.stepped = None  # no further steps are measured
    draining = drain_and_see(engine, monkeypatch)
    gated.next()
    snapshot = handed_back(long)
    assert snapshot is not None
    assert snapshot.steps_done >= 2
    assert not short.done()
    gated.allow()
    draining.result(SOON)
    assert short.result(0).image.getpixel((0, 0)) == pixel(1)


def test_what_is_not_done_in_time_after_all_is_handed_back_with_its_state(
    engine: Engine, gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    until_handed_back = 0.5  # the rest of the drain is reserved for storing the state
    monkeypatch.setattr("workers.engine.engine._HAND_BACK_SHARE", 1 - until_handed_back / LONG)
    future = engine.submit(request("a", steps=1000))
    gated.begun()
    gated.next()
    engine._renders["a"].request.seconds_per_forward = 1e-6  # earlier steps were faster
    began = time.monotonic()
    draining = drain_and_see(engine, monkeypatch)
    assert time.monotonic() - began >= until_handed_back
    gated.allow()
    draining.result(SOON)
    snapshot = handed_back(future)
    assert snapshot is not None
    assert snapshot.steps_done == 2


@pytest.mark.parametrize("paces", [(None, None), (60.0, 60.0), (60.0, 1e-6)], ids=["new", "late", "late and early"])
def test_a_drain_ends_in_time_even_when_a_forward_hangs(
    engine: Engine, gated: Gated, paces: tuple[float | None, float | None]
) -> None:
    first = engine.submit(request("first", steps=1))
    gated.begun()
    futures = [engine.submit(request(name, steps=1000)) for name in "ab"]
    assert gated.next() == ["a", "b"]
    for name, pace in zip("ab", paces, strict=True):
        engine._renders[name].request.seconds_per_forward = pace
    began = time.monotonic()
    engine.drain(0.4)
    assert 0.3 < time.monotonic() - began < SOON / 2
    assert [handed_back(future) for future in futures] == [None, None]
    assert engine.progress() == {}
    first.result(0)


@pytest.mark.parametrize("begun", [False, True])
def test_one_is_handed_back_while_its_neighbours_go_on(engine: Engine, gated: Gated, begun: bool) -> None:
    stays = engine.submit(request("stays", steps=4))
    gated.begun()
    leaves = engine.submit(request("leaves", steps=9))
    assert gated.next() == ["stays", "leaves"]
    if begun:
        gated.next()
    assert engine.hand_back("leaves", "its batch is paused")
    assert not leaves.done()  # the forward under way contains its rows
    assert engine.cancel("leaves")  # too late: it is being handed back already
    gated.allow()
    snapshot = handed_back(leaves)
    assert snapshot is not None
    assert snapshot.steps_done == 1 + begun
    assert stays.result(SOON).image.getpixel((0, 0)) == pixel(1)
    assert not engine.hand_back("leaves", "it is gone")


def test_a_denoised_request_is_not_handed_back_but_finished(engine: Engine, gated: Gated) -> None:
    decoding, decoded = threading.Event(), threading.Event()

    def wait_for_it(_: object) -> None:
        decoding.set()
        assert decoded.wait(SOON)

    gated.faults["decode"] = wait_for_it
    future = engine.submit(request("a", steps=1))
    gated.allow()
    assert decoding.wait(SOON)
    assert engine.hand_back("a", "too late")
    decoded.set()
    assert future.result(SOON).image.getpixel((0, 0)) == pixel(1)


def test_an_idle_engine_drains_at_once(engine: Engine) -> None:
    in_thread(lambda: engine.drain(LONG)).result(SOON)

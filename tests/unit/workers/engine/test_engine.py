"""Requests enter, share forwards, and leave: the engine over a null pipeline whose every forward waits for the test."""

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch

from farm.errors import FarmError, ModelError, RenderCancelled, RenderHandedBack
from tests.gated import SOON, Gated, fail, in_thread, pixel, request, running
from tests.integration.conftest import wait_until
from workers.engine.engine import Engine
from workers.engine.warming import warm
from workers.models.pins import Pins
from workers.pipelines.null import NullPipeline
from workers.render.request import Progress, Rendered

# --- renders


def test_a_render_says_what_it_is(engine: Engine, gated: Gated) -> None:
    gated.allow()
    rendered = engine.submit(request("a", steps=5, seed=7, width=72, height=96)).result(SOON)
    assert isinstance(rendered, Rendered)
    assert rendered.image.mode == "RGB"
    assert rendered.image.size == (rendered.width, rendered.height) == (72, 96)
    assert (rendered.model, rendered.model_sha256) == ("tiny", gated.sha256)
    assert (rendered.steps, rendered.scheduler, rendered.warnings) == (5, "none", ())
    assert (rendered.device, rendered.dtype) == ("cpu", "float32")
    assert rendered.render_seconds > 0
    assert rendered.frames == ()


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_request_takes_exactly_its_steps(engine: Engine, gated: Gated, steps: int) -> None:
    gated.allow()
    image = engine.submit(request("a", steps, seed=3)).result(SOON).image
    assert image.getcolors() == [(64 * 64, pixel(3))]
    assert gated.forwards == [["a"]] * steps


def test_requests_join_and_leave_between_two_steps(engine: Engine, gated: Gated) -> None:
    a = engine.submit(request("a", steps=3, seed=1))
    gated.begun()
    b = engine.submit(request("b", steps=1, seed=2, guidance_scale=0.0))
    c = engine.submit(request("c", steps=3, seed=3, scheduler="heun"))
    gated.allow()
    for future, seed in ((a, 1), (b, 2), (c, 3)):
        assert future.result(SOON).image.getpixel((0, 0)) == pixel(seed)
    assert gated.forwards == [["a"], ["a", "b", "c"], ["a", "c"], ["c"]]


def test_a_finished_request_gives_its_slot_to_the_next_in_line(engine: Engine, gated: Gated) -> None:
    futures = [engine.submit(request("a", steps=1))]
    gated.begun()
    futures += [engine.submit(request(name, steps=2)) for name in "bc"]
    gated.next()
    futures += [engine.submit(request(name, steps=2)) for name in "de"]
    gated.allow()
    for future in futures:
        future.result(SOON)
    assert gated.forwards[:4] == [["a"], ["b", "c"], ["b", "c", "d"], ["d", "e"]]


def test_those_that_finish_at_the_same_step_are_decoded_together(engine: Engine, gated: Gated) -> None:
    decoding, decode = threading.Event(), threading.Event()

    def wait(_: object) -> None:
        decoding.set()
        assert decode.wait(SOON)

    gated.faults["decode"] = wait
    futures = [engine.submit(request("first", steps=1))]
    gated.begun()
    futures += [engine.submit(request("a", seed=2)), engine.submit(request("b", seed=3))]
    assert [gated.next(), gated.next()] == [["a", "b"]] * 2
    futures.append(engine.submit(request("last")))
    assert gated.next() == ["last"]
    assert decoding.wait(SOON)  # of the first; a and b wait for it
    decode.set()
    for future, seed in zip(futures[:3], (1, 2, 3), strict=True):
        assert future.result(SOON).image.getpixel((0, 0)) == pixel(seed)
    assert gated.decoded == [1, 2]


# --- progress


def test_progress_is_seen_while_a_forward_runs(engine: Engine, gated: Gated) -> None:
    engine.submit(request("a", steps=4))
    gated.begun()
    engine.submit(request("b", steps=9))
    seen = engine.progress()
    assert seen["b"] == Progress(0, 9, None)
    assert (seen["a"].steps_done, seen["a"].steps_total, seen["a"].seconds_per_step) == (0, 4, None)
    assert seen["a"].seconds is not None
    gated.next()
    seen = engine.progress()
    assert seen["a"].steps_done == 1
    assert 0 < seen["a"].seconds_per_step <= seen["a"].seconds
    assert engine.busy_seconds > 0


def test_a_device_that_hangs_beside_the_forwards_is_noticed_too(engine: Engine) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def work() -> None:
        hangs.set()
        assert goes_on.wait(SOON)

    for side in (engine._encoder.side, engine._decoder.side):
        hangs.clear(), goes_on.clear()
        assert engine.busy_seconds == 0.0
        done = side.start(torch.device("meta"), work)
        assert hangs.wait(SOON)
        assert engine.busy_seconds > 0
        goes_on.set()
        done.result(SOON)
    assert engine.busy_seconds == 0.0
    side = engine._decoder.side
    side.answered()
    assert engine.busy_seconds == 0.0

    def film() -> tuple[float, float]:
        wait_until(lambda: side.busy_seconds > 0.05, "it takes long")
        before = side.busy_seconds
        side.answered()
        return before, side.busy_seconds

    before, after = side.run(torch.device("meta"), film)
    assert after < before
    # Not counted on the CPU, where one large picture may take long.
    assert engine._decoder.side.run(torch.device("cpu"), lambda: engine.busy_seconds) == 0.0


def test_an_idle_engine_is_not_busy(engine: Engine, gated: Gated) -> None:
    assert engine.busy_seconds == 0.0
    assert engine._accepting


def test_the_pace_is_smoothed_and_tells_how_long_the_rest_takes() -> None:
    one = request("a", steps=10)
    NullPipeline().plan(one)
    assert (one.seconds_per_step, one.seconds_left) == (None, None)
    one.stepped = 100.0
    one.stepped_at(102.0)
    assert (one.seconds_per_step, one.seconds_left) == (2.0, 18.0)
    one.stepped_at(108.0)
    assert one.seconds_per_step == pytest.approx(0.7 * 2 + 0.3 * 6)
    assert one.seconds_left == pytest.approx(8 * 3.2)


def test_progress_counts_the_steps_that_were_asked_for_whatever_the_forwards() -> None:
    heun = request("a", steps=20)  # a second-order sampler takes 19 forwards for 10 steps
    NullPipeline().plan(heun)
    heun.spec = heun.spec.model_copy(update={"num_inference_steps": 10})
    shown = []
    for heun.step_index in range(21):
        shown.append(heun.steps_done)
    assert (shown[0], shown[-1]) == (0, 10)
    assert shown == sorted(shown)
    assert 10 not in shown[:-1]
    heun.seconds_per_forward = 0.5
    assert heun.seconds_per_step == 1.0


# --- cancelling


def test_a_cancelled_request_leaves_between_two_steps(engine: Engine, gated: Gated) -> None:
    first = engine.submit(request("first", steps=1))
    gated.begun()
    a, b = engine.submit(request("a", steps=1)), engine.submit(request("b", steps=3))
    assert gated.next() == ["a", "b"]
    assert engine.cancel("b")
    assert not b.done()  # the forward under way contains its rows
    gated.allow()
    with pytest.raises(RenderCancelled, match="b was cancelled"):
        b.result(SOON)
    first.result(SOON)
    a.result(SOON)
    engine.submit(request("c")).result(SOON)
    assert gated.forwards[2:] == [["c"], ["c"]]
    assert gated.decoded == [1, 1, 1]


def test_a_request_in_line_can_be_cancelled(engine: Engine, gated: Gated) -> None:
    first = engine.submit(request("a"))
    gated.begun()
    second = engine.submit(request("b"))
    assert engine.cancel("b")
    gated.allow()
    with pytest.raises(RenderCancelled):
        second.result(SOON)
    first.result(SOON)
    assert all("b" not in ids for ids in gated.forwards)


def test_cancelling_what_is_not_here_says_so(engine: Engine) -> None:
    assert not engine.cancel("never here")


def test_the_futures_own_cancel_does_nothing(engine: Engine, gated: Gated) -> None:
    future = engine.submit(request("a"))
    assert not future.cancel()
    gated.allow()
    future.result(SOON)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_newer_attempt_takes_the_place_of_the_older(engine: Engine, gated: Gated, steps: int) -> None:
    older = engine.submit(request("a", steps, seed=1))  # with one step, it is in its last forward
    gated.begun()
    newer = engine.submit(request("a", steps=2, seed=2))
    with pytest.raises(RenderCancelled, match="newer attempt"):
        older.result(0)
    gated.allow()
    assert newer.result(SOON).image.getpixel((0, 0)) == pixel(2)
    assert gated.forwards == [["a"]] * 3


def test_an_older_attempt_that_comes_later_does_not_take_the_place_of_the_newer(engine: Engine, gated: Gated) -> None:
    newer, older = request("a", steps=2, seed=2), request("a", steps=2, seed=1)
    newer.attempt = 2
    future = engine.submit(newer)
    gated.begun()
    with pytest.raises(RenderCancelled, match="newer attempt"):
        engine.submit(older)
    gated.allow()
    assert future.result(SOON).image.getpixel((0, 0)) == pixel(2)


# --- the line


def test_a_model_that_is_not_served_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(ModelError, match="model 'other' is not served here; served: tiny"):
        engine.submit(request("a", model="other"))


def test_submit_waits_for_room_in_line(engine: Engine, gated: Gated) -> None:
    futures = [engine.submit(request("0", steps=1))]
    gated.begun()
    futures += [engine.submit(request(name, steps=1)) for name in "12"]
    late = in_thread(lambda: engine.submit(request("3")))
    assert not wait([late], 0.05).done
    gated.allow()
    assert isinstance(late.result(SOON).result(SOON), Rendered)
    for future in futures:
        future.result(SOON)


def test_an_engine_that_was_not_started_takes_nothing(gated: Gated) -> None:
    pins = Pins.of({"tiny": gated})
    engine = Engine(pins)
    assert not engine._accepting
    with pytest.raises(RenderHandedBack, match="takes no more requests"):
        engine.submit(request("a"))
    assert pins._users["tiny"] == 0
    engine.stop()


def test_a_stopped_engine_has_no_thread_and_no_open_future(gated: Gated) -> None:
    with running(gated, slots=1) as engine:
        futures = [engine.submit(request(name)) for name in "ab"]
        gated.begun()
        gated.allow()
    for future in futures:
        assert future.done()
        assert future.exception() is None or isinstance(future.exception(), FarmError)
    assert not engine._accepting
    assert not engine._thread.is_alive()


def test_many_threads_hand_in_and_each_gets_its_own_picture() -> None:
    with running(NullPipeline(), slots=4, line=3) as engine:

        def render(seed: int) -> bool:
            size = 64 + 8 * (seed % 3)
            one = request(str(seed), 1 + seed % 5, priority=seed % 101, seed=seed, width=size)
            image = engine.submit(one).result(SOON).image
            return image.size == (size, 64) and image.getpixel((0, 0)) == pixel(seed)

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(render, range(200)))


# --- warming


def test_warming_renders_with_every_model() -> None:
    models = {"one": Gated(), "two": Gated()}
    engine = Engine(pins := Pins.of(models))
    engine.start()
    for model in models.values():
        model.allow()
    warm(engine, pins)
    assert [model.decoded for model in models.values()] == [[1], [1]]
    engine.stop()


def test_a_model_that_can_not_render_is_named_when_warming(engine: Engine, gated: Gated) -> None:
    gated.faults["denoise"] = fail(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    gated.allow()
    with pytest.raises(ModelError, match="model 'tiny' can't render: the forward failed"):
        warm(engine, engine._pins)

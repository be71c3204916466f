"""The engine over a null pipeline whose every forward waits for the test."""

import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from farm.errors import (
    BadImage,
    BadRequest,
    EngineFailed,
    FarmError,
    ModelError,
    RenderCancelled,
    RenderError,
    RenderHandedBack,
)
from farm.spec import RenderSpec
from workers.engine import Engine, Progress
from workers.pins import Pins
from workers.pipelines.null import NullPipeline, colour
from workers.request import Rendered, RenderRequest

SOON = 30.0
"""Seconds after which a test that waits in vain gives up."""


class Gated:
    """A null pipeline that does one forward when told to, and can be made to fail anywhere."""

    def __init__(self) -> None:
        self.null = NullPipeline()
        self.forwards: list[list[str]] = []
        self.decoded: list[list[str]] = []
        self.faults: dict[str, Callable[[Any], None]] = {}
        """By `verb` or `verb id`: called with the verb's first argument before the verb is."""
        self._allowed = threading.Semaphore(0)
        self._begun = threading.Semaphore(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.null, name)

    def fault(self, verb: str, requests: Any) -> None:
        for request in requests if isinstance(requests, list) else [requests]:
            self.faults.get(f"{verb} {request.id}", lambda _: None)(requests)
        self.faults.get(verb, lambda _: None)(requests)

    def encode(self, request: RenderRequest) -> None:
        self.fault("encode", request)
        self.null.encode(request)

    def denoise(self, requests: list[RenderRequest]) -> list[torch.Tensor]:
        self.forwards.append([request.id for request in requests])
        self._begun.release()
        assert self._allowed.acquire(timeout=SOON)
        self.fault("denoise", requests)
        return self.null.denoise(requests)

    def step(self, request: RenderRequest, output: torch.Tensor) -> None:
        self.null.step(request, output)
        self.fault("step", request)

    def decode(self, requests: list[RenderRequest]) -> torch.Tensor:
        self.decoded.append([request.id for request in requests])
        self.fault("decode", requests)
        return self.null.decode(requests)

    def begun(self) -> list[str]:
        """Wait for the next forward to begin; the ids in it."""
        assert self._begun.acquire(timeout=SOON)
        return self.forwards[-1]

    def allow(self, forwards: int = 1000) -> None:
        """Let the forward under way end, and so many in all."""
        self._allowed.release(forwards)


@pytest.fixture
def gated() -> Gated:
    return Gated()


@pytest.fixture
def engine(gated: Gated) -> Iterator[Engine]:
    engine = Engine(Pins({"tiny": gated}), slots=3, line=2)
    engine.start()
    yield engine
    gated.allow()
    engine.stop()


def request(request_id: str, steps: int = 2, **spec: Any) -> RenderRequest:
    return RenderRequest(request_id, RenderSpec(prompt="x", num_inference_steps=steps, **spec))


def fail(error: BaseException) -> Callable[[Any], None]:
    def raise_it(_: Any) -> None:
        raise error

    return raise_it


def in_thread(call: Callable[[], Any]) -> Future[Any]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future


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


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_request_takes_exactly_its_steps(engine: Engine, gated: Gated, steps: int) -> None:
    gated.allow()
    image = engine.submit(request("a", steps, seed=3)).result(SOON).image
    expected = tuple(colour(3).mul(255).round().int().flatten().tolist())
    assert image.getcolors() == [(64 * 64, expected)]
    assert gated.forwards == [["a"]] * steps


def test_requests_join_and_leave_between_two_steps(engine: Engine, gated: Gated) -> None:
    a = engine.submit(request("a", steps=3))
    gated.begun()
    b = engine.submit(request("b", steps=1))
    c = engine.submit(request("c", steps=3))
    gated.allow()
    for future in (a, b, c):
        future.result(SOON)
    assert gated.forwards == [["a"], ["a", "b", "c"], ["a", "c"], ["c"]]


def test_a_finished_request_gives_its_slot_to_the_next_in_line(engine: Engine, gated: Gated) -> None:
    futures = [engine.submit(request("a", steps=1))]
    gated.begun()
    futures += [engine.submit(request(name, steps=2)) for name in "bc"]
    gated.allow(1)
    gated.begun()
    futures += [engine.submit(request(name, steps=2)) for name in "de"]
    gated.allow()
    for future in futures:
        future.result(SOON)
    assert gated.forwards[:4] == [["a"], ["b", "c"], ["b", "c", "d"], ["d", "e"]]


def test_sizes_take_turns(engine: Engine, gated: Gated) -> None:
    first = engine.submit(request("first", steps=1))
    gated.begun()
    futures = [engine.submit(request(str(width), width=width)) for width in (64, 128)]
    gated.allow()
    for future in [first, *futures]:
        future.result(SOON)
    assert gated.forwards == [["first"], ["64"], ["128"], ["64"], ["128"]]


def test_those_that_finish_at_the_same_step_are_decoded_together(engine: Engine, gated: Gated) -> None:
    first = engine.submit(request("first", steps=1))
    gated.begun()
    futures = [engine.submit(request(name)) for name in "ab"]
    gated.allow()
    for future in [first, *futures]:
        future.result(SOON)
    assert gated.decoded == [["first"], ["a", "b"]]


# --- progress


def test_progress_is_seen_while_a_forward_runs(engine: Engine, gated: Gated) -> None:
    engine.submit(request("a", steps=4))
    gated.begun()
    engine.submit(request("b", steps=9))
    seen = engine.progress()
    assert seen["b"] == Progress(0, 9, None)
    assert (seen["a"].steps_done, seen["a"].steps_total) == (0, 4)
    assert seen["a"].seconds is not None
    gated.allow(1)
    gated.begun()
    assert engine.progress()["a"].steps_done == 1
    assert engine.busy_seconds > 0


def test_progress_counts_the_steps_that_were_asked_for() -> None:
    heun = request("a", steps=10)
    heun.started, heun.timesteps = 0.0, torch.zeros(19)
    shown = []
    for heun.step_index in range(20):
        shown.append(heun.steps_done)
    assert (shown[0], shown[-1]) == (0, 10)
    assert shown == sorted(shown)
    assert 10 not in shown[:-1]


def test_nothing_is_left_of_a_request_that_ended(engine: Engine, gated: Gated) -> None:
    gated.allow()
    engine.submit(request("a")).result(SOON)
    assert engine.progress() == {}


# --- cancelling


def test_a_cancelled_request_leaves_between_two_steps(engine: Engine, gated: Gated) -> None:
    a, b = engine.submit(request("a", steps=1)), engine.submit(request("b", steps=3))
    gated.begun()
    if gated.forwards == [["a"]]:  # b came a moment too late for the first forward
        gated.allow(1)
        gated.begun()
    assert engine.cancel("b")
    with pytest.raises(RenderCancelled, match="b was cancelled"):
        b.result(0)  # at once, in the middle of a forward
    gated.allow()
    a.result(SOON)
    c = engine.submit(request("c"))
    c.result(SOON)
    assert gated.forwards[-2:] == [["c"], ["c"]]
    assert gated.decoded == [["a"], ["c"]]


def test_a_request_in_line_can_be_cancelled(engine: Engine, gated: Gated) -> None:
    futures = [engine.submit(request("a"))]
    gated.begun()
    futures.append(engine.submit(request("b")))
    assert engine.cancel("b")
    gated.allow()
    with pytest.raises(RenderCancelled):
        futures[1].result(SOON)
    futures[0].result(SOON)
    assert all("b" not in ids for ids in gated.forwards)


def test_cancelling_what_is_not_here_says_so(engine: Engine) -> None:
    assert not engine.cancel("never here")


def test_a_newer_attempt_takes_the_place_of_the_older(engine: Engine, gated: Gated) -> None:
    older = engine.submit(request("a", steps=3, seed=1))
    gated.begun()
    newer = engine.submit(request("a", steps=2, seed=2))
    with pytest.raises(RenderCancelled, match="newer attempt"):
        older.result(0)
    gated.allow()
    expected = tuple(colour(2).mul(255).round().int().flatten().tolist())
    assert newer.result(SOON).image.getpixel((0, 0)) == expected
    assert gated.forwards == [["a"]] * 3


# --- failing


@pytest.mark.parametrize("verb", ["encode", "step", "decode"])
def test_a_failing_request_does_not_hurt_its_neighbours(engine: Engine, gated: Gated, verb: str) -> None:
    gated.faults[f"{verb} bad"] = fail(KeyError("oops"))
    first = engine.submit(request("first", steps=1))
    gated.begun()
    bad, good = engine.submit(request("bad")), engine.submit(request("good"))
    gated.allow()
    with pytest.raises(RenderError, match="KeyError: 'oops'") as caught:
        bad.result(SOON)
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.retryable
    assert good.result(SOON).image.size == (64, 64)
    first.result(SOON)
    assert engine.healthy


def test_the_farms_own_errors_come_out_as_they_are(engine: Engine, gated: Gated) -> None:
    gated.faults["encode a"] = fail(BadRequest("no such sampler here"))
    with pytest.raises(BadRequest, match="no such sampler here"):
        engine.submit(request("a")).result(SOON)


def test_nan_in_the_latents_is_a_bad_image_that_names_its_step(engine: Engine, gated: Gated) -> None:
    def poison(request: RenderRequest) -> None:
        if request.step_index == 2:
            request.latents[0, 0, 0, 0] = torch.nan

    gated.faults["step bad"] = poison
    gated.allow()
    bad, good = engine.submit(request("bad", steps=5)), engine.submit(request("good", steps=5))
    with pytest.raises(BadImage, match="after step 3"):
        bad.result(SOON)
    good.result(SOON)


def test_nan_in_the_picture_is_a_bad_image(engine: Engine, gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated, "decode", lambda _: torch.full((1, 3, 64, 64), torch.nan))
    gated.allow()
    with pytest.raises(BadImage, match="decoded picture"):
        engine.submit(request("a")).result(SOON)


def test_an_exploding_forward_ends_its_own_requests_and_the_loop_goes_on(engine: Engine, gated: Gated) -> None:
    first = engine.submit(request("first", steps=1))
    gated.begun()
    gated.faults["denoise a"] = fail(torch.OutOfMemoryError("no room"))
    doomed = [engine.submit(request("a")), engine.submit(request("b"))]
    gated.allow(1)
    gated.begun()
    other = engine.submit(request("other", width=128))
    gated.allow()
    for future in doomed:
        with pytest.raises(EngineFailed, match="no room") as caught:
            future.result(SOON)
        assert caught.value.retryable
    other.result(SOON)
    first.result(SOON)
    assert engine.healthy
    assert engine.failed is None


def test_an_error_keeps_no_tensor_alive(engine: Engine, gated: Gated) -> None:
    tensors: list[weakref.ref[torch.Tensor]] = []

    def run_out_of_memory(_: Any) -> None:
        activations = torch.zeros(8)
        tensors.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("no room")

    gated.faults["denoise"] = run_out_of_memory
    gated.allow()
    error = engine.submit(request("a")).exception(SOON)
    assert isinstance(error, EngineFailed)
    assert tensors[0]() is None


def test_a_lost_device_ends_everything_and_is_told(engine: Engine, gated: Gated) -> None:
    gated.faults["denoise"] = fail(torch.AcceleratorError("device-side assert"))
    running = engine.submit(request("running"))
    gated.begun()
    waiting = engine.submit(request("waiting"))
    gated.allow(1)
    for future in (running, waiting):
        with pytest.raises(EngineFailed, match="device-side assert"):
            future.result(SOON)
    assert isinstance(engine.failed, torch.AcceleratorError)
    assert not engine.healthy
    with pytest.raises(EngineFailed, match="device-side assert"):
        engine.submit(request("late"))


# --- the line


def test_a_model_that_is_not_held_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(ModelError, match="model 'other' is not held here; held: tiny"):
        engine.submit(request("a", model="other"))


def test_submit_waits_for_room_in_line(engine: Engine, gated: Gated) -> None:
    futures = [engine.submit(request("0", steps=1))]
    gated.begun()
    futures += [engine.submit(request(name, steps=1)) for name in "12"]
    with pytest.raises(RenderHandedBack, match="the line stayed full"):
        engine.submit(request("3"), timeout=0.01)
    late = in_thread(lambda: engine.submit(request("4")))
    assert not late.done()
    gated.allow()
    assert isinstance(late.result(SOON).result(SOON), Rendered)
    for future in futures:
        future.result(SOON)
    assert ["3"] not in gated.forwards


def test_whoever_waits_for_room_is_handed_back_by_a_drain(engine: Engine, gated: Gated) -> None:
    engine.submit(request("0"))
    gated.begun()
    for name in "12":
        engine.submit(request(name))
    late = in_thread(lambda: engine.submit(request("3")))
    engine.drain(0)
    with pytest.raises(RenderHandedBack):
        late.result(SOON)


def test_an_engine_that_was_not_started_takes_nothing(gated: Gated) -> None:
    engine = Engine(Pins({"tiny": gated}))
    assert not engine.healthy
    with pytest.raises(RenderHandedBack, match="takes no more requests"):
        engine.submit(request("a"))
    engine.stop()


# --- the end


def test_a_drain_finishes_what_it_can(engine: Engine, gated: Gated) -> None:
    running = engine.submit(request("running", steps=3))
    gated.begun()
    waiting = engine.submit(request("waiting"))
    draining = in_thread(lambda: engine.drain(SOON))
    with pytest.raises(RenderHandedBack, match="waiting: its worker drains"):
        waiting.result(SOON)
    with pytest.raises(RenderHandedBack, match="takes no more"):
        engine.submit(request("late"))
    assert not running.done()
    gated.allow()
    draining.result(SOON)
    assert running.done()
    assert isinstance(running.result(), Rendered)


def test_a_drain_hands_back_what_is_not_done_in_time_even_from_a_forward_that_hangs(
    engine: Engine, gated: Gated
) -> None:
    running = engine.submit(request("running"))
    gated.begun()
    engine.drain(0.01)
    with pytest.raises(RenderHandedBack, match="not done in time"):
        running.result(0)
    assert engine.progress() == {}


def test_a_stopped_engine_has_no_thread_and_no_open_future(gated: Gated) -> None:
    engine = Engine(Pins({"tiny": gated}), slots=1)
    engine.start()
    futures = [engine.submit(request(name)) for name in "ab"]
    gated.begun()
    gated.allow()
    engine.stop()
    for future in futures:
        assert future.done()
        assert future.exception() is None or isinstance(future.exception(), FarmError)
    assert not engine.healthy
    assert not [thread for thread in threading.enumerate() if thread is engine._thread]


# --- warming


def test_warming_renders_with_every_model() -> None:
    models = {"one": Gated(), "two": Gated()}
    engine = Engine(Pins(models))
    engine.start()
    for model in models.values():
        model.allow()
    engine.warm()
    assert [len(model.decoded) for model in models.values()] == [1, 1]
    engine.stop()


def test_a_model_that_can_not_render_is_named_when_warming(engine: Engine, gated: Gated) -> None:
    gated.faults["denoise"] = fail(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    gated.allow()
    with pytest.raises(ModelError, match="model 'tiny' can't render: the forward failed"):
        engine.warm()


def test_many_threads_hand_in_and_each_gets_its_own_picture() -> None:
    engine = Engine(Pins({"tiny": NullPipeline()}), slots=4, line=3)
    engine.start()

    def render(seed: int) -> bool:
        size = 64 + 8 * (seed % 3)
        image = engine.submit(request(str(seed), 1 + seed % 5, seed=seed, width=size)).result(SOON).image
        expected = tuple(colour(seed).mul(255).round().int().flatten().tolist())
        return image.size == (size, 64) and image.getpixel((0, 0)) == expected

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(render, range(200)))
    engine.stop()

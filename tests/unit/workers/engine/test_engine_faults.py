"""An error in the engine fails the request concerned, with a message, and no other request."""

import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from farm.errors import BadImage, BadRequest, EngineFailed, ModelError, OutOfMemory, RenderError
from tests.gated import SOON, Gated, fail, pixel, request, running
from workers.engine.decoder import rendered
from workers.engine.engine import Engine
from workers.engine.warming import warm
from workers.pipelines.null import NullPipeline, colour


@pytest.fixture
def engine(gated: Gated) -> Iterator[Engine]:
    with running(gated, slots=8, line=8) as engine:
        yield engine


# --- one request's errors


@pytest.mark.parametrize("verb", ["step", "decode", "denoise"])
def test_a_failing_request_does_not_hurt_its_neighbours(engine: Engine, gated: Gated, verb: str) -> None:
    def oops(argument: Any) -> None:
        # A decoder receives latents without ids; after its last step, the latents of a null render are its colour.
        if verb != "decode" or any(torch.allclose(one, colour(9)) for one in argument):
            raise KeyError("oops")

    gated.faults[verb if verb == "decode" else f"{verb} bad"] = oops
    first = engine.submit(request("first", steps=1, seed=1))
    gated.begun()
    bad, good = engine.submit(request("bad", seed=9)), engine.submit(request("good", seed=2))
    gated.allow()
    with pytest.raises(RenderError, match=r"KeyError.*oops") as caught:
        bad.result(SOON)
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.retryable
    assert good.result(SOON).image.getpixel((0, 0)) == pixel(2)
    assert first.result(SOON).image.getpixel((0, 0)) == pixel(1)
    assert engine._accepting


def test_a_request_that_can_not_be_encoded_is_refused_where_it_was_handed_in(engine: Engine, gated: Gated) -> None:
    gated.faults["encode bad"] = fail(KeyError("oops"))
    with pytest.raises(RenderError, match="KeyError: 'oops'"):
        engine.submit(request("bad"))
    gated.allow()
    engine.submit(request("good")).result(SOON)


def test_errors_of_the_farm_are_raised_unchanged(engine: Engine, gated: Gated) -> None:
    error = BadRequest("no such sampler here")
    gated.faults["encode a"] = fail(error)
    with pytest.raises(BadRequest, match="no such sampler here") as caught:
        engine.submit(request("a"))
    assert caught.value is error
    assert error.__cause__ is None


# --- invalid pictures


def test_nan_in_the_latents_is_a_bad_image_that_names_its_step(engine: Engine, gated: Gated) -> None:
    gated.poison["bad"] = 2
    first = engine.submit(request("first", steps=1))
    gated.begun()
    bad, good = engine.submit(request("bad", steps=5)), engine.submit(request("good", steps=5, seed=2))
    gated.allow()
    with pytest.raises(BadImage, match="latents after step 3"):
        bad.result(SOON)
    assert good.result(SOON).image.getpixel((0, 0)) == pixel(2)
    first.result(SOON)
    assert gated.forwards[1:] == [["bad", "good"]] * 3 + [["good"]] * 2


def test_on_a_gpu_the_first_bad_step_is_noted_unread_and_told_at_the_end() -> None:
    pipeline, one = NullPipeline(), request("a", steps=9)
    pipeline.plan(one)
    for one.step_index, finite in enumerate([True, True, False, True, False], start=1):
        one.note_finite(torch.tensor(finite))
    assert torch.equal(one.first_bad, torch.tensor(3))
    with pytest.raises(BadImage, match="latents after step 3"):
        rendered(one, pipeline, torch.ones(3, 8, 8))


def test_on_a_gpu_what_was_finite_all_along_is_a_picture() -> None:
    pipeline, one = NullPipeline(), request("a", steps=9)
    pipeline.plan(one)
    for one.step_index in range(1, 10):
        one.note_finite(torch.tensor(True))
    assert rendered(one, pipeline, torch.ones(3, 8, 8)).image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("value", "what"), [(torch.nan, "NaN or infinity in the picture"), (0.0, "black all over")])
def test_a_picture_of_nothing_is_a_bad_image_that_names_its_step(
    engine: Engine, gated: Gated, monkeypatch: pytest.MonkeyPatch, value: float, what: str
) -> None:
    monkeypatch.setattr(gated, "decode", lambda latents: torch.full((len(latents), 3, 64, 64), value))
    gated.allow()
    with pytest.raises(BadImage, match=what) as caught:
        engine.submit(request("a", steps=4)).result(SOON)
    assert "after step 4" in str(caught.value)
    assert not caught.value.retryable


# --- memory


def test_a_forward_that_does_not_fit_is_halved_and_later_ones_are_smaller(engine: Engine, gated: Gated) -> None:
    gated.most_rows = 3
    futures = [engine.submit(request("0", steps=1, seed=0))]
    gated.begun()
    futures += [engine.submit(request(str(seed), steps=2, seed=seed)) for seed in range(1, 7)]
    gated.allow()
    for seed, future in enumerate(futures):
        assert future.result(SOON).image.getpixel((0, 0)) == pixel(seed)
    assert [len(ids) for ids in gated.forwards] == [1, 6, 3, 3, 3, 3]
    assert engine.slots == 3


def test_halves_that_do_not_fit_are_halved_again(engine: Engine, gated: Gated) -> None:
    gated.most_rows = 1
    futures = [engine.submit(request("0", steps=1))]
    gated.begun()
    futures += [engine.submit(request(str(seed), steps=1)) for seed in range(1, 6)]
    gated.allow()
    for future in futures:
        future.result(SOON)
    assert engine.slots == 1


def test_a_request_that_does_not_fit_alone_says_what_it_would_need(engine: Engine, gated: Gated) -> None:
    gated.rows["big"] = 2
    first = engine.submit(request("first", steps=1))
    gated.begun()
    big, good = engine.submit(request("big", steps=9)), engine.submit(request("good", steps=9))
    gated.next()
    gated.next()
    gated.most_rows = 1
    gated.allow()
    with pytest.raises(OutOfMemory, match=r"\(2 rows of 3x8x8 latents, .*float32\).* at step 2: CUDA.*rows$") as caught:
        big.result(SOON)
    assert caught.value.retryable
    good.result(SOON)
    first.result(SOON)


def test_no_memory_for_the_texts_is_told_as_such(engine: Engine, gated: Gated) -> None:
    gated.rows["a"] = 2
    gated.faults["encode a"] = fail(torch.OutOfMemoryError("no room\nat all"))
    with pytest.raises(OutOfMemory, match=r"no memory to encode the texts of its 2 rows, before step 1: no room$"):
        engine.submit(request("a"))


def test_no_memory_for_a_step_or_for_the_picture_is_told_as_such(engine: Engine, gated: Gated) -> None:
    gated.allow()
    gated.faults["step a"] = gated.faults["decode"] = fail(torch.OutOfMemoryError(""))
    with pytest.raises(OutOfMemory, match="no memory to step 3x8x8 latents at step 1"):
        engine.submit(request("a", steps=3)).result(SOON)
    with pytest.raises(OutOfMemory, match="no memory to decode 3x8x16 latents after step 3"):
        engine.submit(request("b", steps=3, width=128)).result(SOON)


def test_pictures_that_do_not_fit_together_are_decoded_one_by_one(engine: Engine, gated: Gated) -> None:
    def one_at_a_time(latents: torch.Tensor) -> None:
        if len(latents) > 1:
            raise torch.OutOfMemoryError("no room")

    gated.faults["decode"] = one_at_a_time
    futures = [engine.submit(request("first", steps=1, seed=0))]
    gated.begun()
    futures += [engine.submit(request(str(seed), steps=1, seed=seed)) for seed in (1, 2)]
    gated.allow()
    for seed, future in enumerate(futures):
        assert future.result(SOON).image.getpixel((0, 0)) == pixel(seed)


def test_an_error_keeps_no_tensor_alive(engine: Engine, gated: Gated) -> None:
    tensors: list[weakref.ref[torch.Tensor]] = []

    def run_out_of_memory(_: Any) -> None:
        activations = torch.zeros(8)
        tensors.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("no room")

    gated.faults["denoise"] = run_out_of_memory
    gated.allow()
    assert isinstance(engine.submit(request("a")).exception(SOON), OutOfMemory)
    assert tensors[0]() is None


# --- the loop


def break_loop(engine: Engine, monkeypatch: pytest.MonkeyPatch, times: int = 1) -> None:
    """Make the choice of the next forward raise that many times."""
    schedule, breaks = engine._schedule, iter(range(times))

    def raise_or_schedule() -> Any:
        if next(breaks, None) is not None:
            raise ZeroDivisionError("no turn")
        return schedule()

    monkeypatch.setattr(engine, "_schedule", raise_or_schedule)


def test_a_broken_loop_fails_its_requests_as_retryable_and_renders_the_next(
    engine: Engine, gated: Gated, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    futures = [engine.submit(request("a"))]
    gated.begun()
    futures.append(engine.submit(request("b")))
    break_loop(engine, monkeypatch)
    gated.allow()
    for future in futures:
        with pytest.raises(EngineFailed, match="the render loop broke: ZeroDivisionError") as caught:
            future.result(SOON)
        assert caught.value.retryable
    assert engine.submit(request("c", seed=5)).result(SOON).image.getpixel((0, 0)) == pixel(5)
    assert engine._accepting
    assert engine.failed is None
    assert [record.levelno for record in caplog.records if "loop broke" in record.message] == [logging.ERROR]


def test_a_loop_that_breaks_four_times_in_a_row_is_given_up(
    engine: Engine, gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated.allow()
    break_loop(engine, monkeypatch, times=4)
    for turn in range(4):
        assert engine._accepting
        with pytest.raises(EngineFailed):
            engine.submit(request(str(turn))).result(SOON)
    assert isinstance(engine.failed, ZeroDivisionError)
    assert not engine._accepting
    with pytest.raises(EngineFailed, match="the render loop broke"):
        engine.submit(request("late"))


def test_breaks_that_are_not_in_a_row_do_not_add_up(
    engine: Engine, gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated.allow()
    for turn in range(3):
        with monkeypatch.context() as broken:
            break_loop(engine, broken, times=3)
            for again in range(3):
                with pytest.raises(EngineFailed):
                    engine.submit(request(f"{turn} {again}")).result(SOON)
            engine.submit(request("good")).result(SOON)
    assert engine.failed is None


@pytest.mark.parametrize("verb", ["denoise", "step", "decode"])
def test_a_lost_device_ends_everything_for_good_and_is_told(engine: Engine, gated: Gated, verb: str) -> None:
    gated.faults[verb] = fail(torch.AcceleratorError("device-side assert"))
    first = engine.submit(request("running", steps=1))
    gated.begun()
    waiting = engine.submit(request("waiting"))
    gated.allow(1)
    for future in (first, waiting):
        with pytest.raises(EngineFailed, match="device-side assert"):
            future.result(SOON)
    assert isinstance(engine.failed, torch.AcceleratorError)
    assert not engine._accepting
    with pytest.raises(EngineFailed, match="device-side assert"):
        engine.submit(request("late"))


def test_a_device_that_is_lost_while_texts_are_encoded_ends_everything_too(engine: Engine, gated: Gated) -> None:
    other = engine.submit(request("other"))
    gated.begun()
    gated.faults["encode a"] = fail(torch.AcceleratorError("device-side assert"))
    with pytest.raises(EngineFailed, match="the device is lost"):
        engine.submit(request("a"))
    with pytest.raises(EngineFailed, match="device-side assert"):
        other.result(SOON)
    assert isinstance(engine.failed, torch.AcceleratorError)


def test_a_model_that_fails_every_forward_leaves_the_engine_healthy(engine: Engine, gated: Gated) -> None:
    gated.faults["denoise"] = fail(RuntimeError("shapes cannot be multiplied"))
    gated.allow()
    for turn in range(5):
        with pytest.raises(EngineFailed, match=r"the forward failed.*shapes"):
            engine.submit(request(str(turn))).result(SOON)
    assert engine.failed is None
    with pytest.raises(ModelError, match="can't render"):
        warm(engine, engine._pins)

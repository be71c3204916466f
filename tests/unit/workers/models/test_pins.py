import gc
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import pytest
import torch

from farm.errors import ModelError, ModelUnavailable
from workers.models.pins import Pins
from workers.pipelines.null import NullPipeline
from workers.render.device import choose_device, choose_dtype

T = TypeVar("T")

SECONDS = 20
"""A timeout longer than any step of these tests takes."""


class Watched(threading.Condition):
    """Signals when a thread waits; the lock is free again only once it does."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self.waiting.release()
        return super().wait(timeout)


class WatchedLine(dict[str, object]):
    """Signals when a thread gets in line, or joins a thread that waits for the same model."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = threading.Semaphore(0)

    def setdefault(self, name: str, turn: object = None) -> object:
        self.joined.release()
        return super().setdefault(name, turn)


class Shelf:
    """Models of given sizes, and a record of their loads."""

    def __init__(self, **nbytes: int) -> None:
        self.nbytes = nbytes
        self.loading: list[str] = []
        self.made: dict[str, weakref.ref[NullPipeline]] = {}
        self.on_load: dict[str, Callable[[], object]] = {}

    def load(self, name: str, source: str) -> NullPipeline:
        self.loading.append(name)
        self.on_load.get(name, lambda: None)()
        pipeline = NullPipeline(name=source, nbytes=self.nbytes[name])
        self.made[name] = weakref.ref(pipeline)
        return pipeline

    def pins(self, memory_bytes: int | None = None, retry_seconds: float = 3600, *, guessed: bool = False) -> Pins:
        sources = {name: f"null:{name}" for name in self.nbytes}

        def size(source: str) -> int:
            return self.nbytes[source.removeprefix("null:")]

        pins = Pins(sources, self.load, memory_bytes, size if guessed else None, retry_seconds)
        pins._changed, pins._line = Watched(), WatchedLine()
        return pins


def until_it_waits(pins: Pins) -> None:
    """Return once one more thread waits for its turn or for memory."""
    assert isinstance(pins._changed, Watched)
    assert pins._changed.waiting.acquire(timeout=SECONDS)


def until_in_line(pins: Pins, threads: int) -> None:
    """Return once that many more threads want a model that is not loaded, or is chosen for eviction."""
    assert isinstance(pins._line, WatchedLine)
    for _ in range(threads):
        assert pins._line.joined.acquire(timeout=SECONDS)


def touch(pins: Pins, *names: str) -> None:
    """Use each of these models, and release it."""
    for name in names:
        with pins.using(name):
            pass


def raising(*errors: Exception | None) -> Callable[[], None]:
    """Return a function that raises one of these errors at each call, and nothing for None."""
    calls = iter(errors)

    def call() -> None:
        if error := next(calls):
            raise error

    return call


def start(call: Callable[..., T], *args: object) -> Future[T]:
    """Run a call in a daemon thread, which does not block the tests if it never ends."""

    def run() -> None:
        try:
            future.set_result(call(*args))
        except BaseException as error:  # noqa: BLE001 - it is for whoever asks for the result
            future.set_exception(error)

    future: Future[T] = Future()
    threading.Thread(target=run, daemon=True).start()
    return future


# --- at the start


def test_nothing_is_loaded_before_it_is_asked_for() -> None:
    shelf = Shelf(b=600, a=300)
    pins = shelf.pins()
    assert (pins.names, pins.held, shelf.loading) == (("b", "a"), (), [])


def test_models_are_loaded_in_the_order_given() -> None:
    shelf = Shelf(b=600, a=300)
    pins = shelf.pins()
    pins.load_all()
    assert shelf.loading == ["b", "a"]
    assert pins.held == ("a", "b")
    assert pins.memory_used == {"b": 600, "a": 300}
    assert pins.loads == 2
    with pins.using("b") as pipeline:
        assert pipeline.name == "null:b"


@pytest.mark.parametrize("guessed", [False, True])
def test_a_model_that_does_not_fit_beside_the_earlier_ones_is_left_until_it_is_used(guessed: bool) -> None:
    shelf = Shelf(a=600, b=600, c=300)
    pins = shelf.pins(1000, guessed=guessed)
    pins.load_all()
    assert pins.held == ("c", "a")
    assert pins.failures == {}
    assert pins.evictions == 0
    assert shelf.loading == (["a", "c"] if guessed else ["a", "b", "c"])
    touch(pins, "b")
    assert pins.held == ("b", "c")


def test_without_a_budget_a_model_is_left_when_the_device_has_no_room_beside_the_earlier_ones() -> None:
    shelf = Shelf(a=600, b=600)
    shelf.on_load["b"] = raising(torch.OutOfMemoryError("tried to allocate 2 GiB"), None)
    pins = shelf.pins()
    pins.load_all()
    assert (pins.held, pins.failures) == (("a",), {})
    touch(pins, "b")
    assert pins.held == ("b", "a")


def test_a_model_that_can_not_be_loaded_is_kept_with_the_reason_and_the_others_serve() -> None:
    shelf = Shelf(a=600, b=600)
    shelf.on_load["a"] = raising(ModelError("no model_index.json in /models/a"))
    pins = shelf.pins()
    pins.load_all()
    assert pins.names == ("a", "b")
    assert pins.held == ("b",)
    assert pins.failures == {"a": "no model_index.json in /models/a"}


def test_if_no_model_can_be_loaded_each_is_named_with_its_reason() -> None:
    shelf = Shelf(a=600, b=600, c=1200)
    shelf.on_load["a"] = raising(ModelError("no model_index.json"))
    shelf.on_load["b"] = raising(torch.OutOfMemoryError("tried to allocate 2 GiB"))
    with pytest.raises(ModelError) as raised:
        shelf.pins(1000).load_all()
    assert str(raised.value).splitlines() == [
        "model 'a': no model_index.json",
        "model 'b': OutOfMemoryError: tried to allocate 2 GiB",
        "model 'c': its 1,200 bytes are more than the 1,000 allowed, even alone",
    ]


def test_pipelines_that_are_loaded_already_can_be_pinned() -> None:
    pipeline = NullPipeline(nbytes=600)
    pins = Pins.of({"a": pipeline})
    assert pins.names == pins.held == ("a",)
    assert pins.use("a") is pipeline


# --- refused models


def test_a_model_not_served_here_is_named_with_those_that_are() -> None:
    with pytest.raises(ModelError, match="model 'c' is not served here; served: a, b"):
        Shelf(a=1, b=1).pins().use("c")


def test_a_failed_model_is_refused_with_its_reason_and_not_loaded_again_at_once() -> None:
    shelf = Shelf(a=1)
    shelf.on_load["a"] = raising(ModelError("no model_index.json"))
    pins = shelf.pins()
    for _ in range(2):
        with pytest.raises(ModelError, match=r"model 'a': no model_index\.json"):
            pins.use("a")
    assert shelf.loading == ["a"]


def test_a_failed_model_is_tried_again_later_and_then_serves() -> None:
    shelf = Shelf(a=1)
    shelf.on_load["a"] = raising(OSError("the share is away"), None)
    pins = shelf.pins(retry_seconds=0)
    with pytest.raises(ModelError, match="model 'a': OSError: the share is away"):
        pins.use("a")
    touch(pins, "a")
    assert pins.failures == {}


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ModelUnavailable("S3 does not answer"), True),
        (torch.OutOfMemoryError("no room"), True),
        (ModelError("no model_index.json"), False),
        (OSError("not a checkpoint"), False),
    ],
)
def test_a_model_that_can_not_be_had_just_now_is_told_from_one_that_is_wrong(error: Exception, passes: bool) -> None:
    shelf = Shelf(a=1)
    shelf.on_load["a"] = raising(error)
    pins = shelf.pins()
    for _ in range(2):  # once while it is loaded, once while it is refused
        with pytest.raises(ModelError) as caught:
            pins.use("a")
        assert isinstance(caught.value, ModelUnavailable) == caught.value.retryable == passes
    assert shelf.loading == ["a"]


def test_a_model_too_large_even_alone_is_refused_unloaded_and_not_loaded_again() -> None:
    shelf = Shelf(a=600, b=1200)
    pins = shelf.pins(1000, retry_seconds=0)
    touch(pins, "a")
    for _ in range(2):
        with pytest.raises(
            ModelError, match="'b': its 1,200 bytes are more than the 1,000 allowed, even alone"
        ) as raised:
            pins.use("b")
        assert shelf.made["b"]() is None, f"kept alive by {raised.value!r}"
    assert shelf.loading == ["a", "b"]
    assert pins.held == ("a",)


def test_a_guess_too_large_for_the_budget_refuses_no_model() -> None:
    pins = Pins({"a": "null:"}, lambda *_: NullPipeline(nbytes=600), 1000, size=lambda _: 1200)
    touch(pins, "a")
    assert pins.held == ("a",)


def test_a_model_without_users_can_not_be_released() -> None:
    pins = Shelf(a=1).pins()
    touch(pins, "a")
    with pytest.raises(ValueError, match="nobody uses model 'a'"):
        pins.release("a")


# --- making room


def test_the_least_recently_used_model_is_evicted() -> None:
    shelf = Shelf(a=400, b=400, c=400)
    pins = shelf.pins(1000)
    touch(pins, "a", "b", "a", "c")
    assert pins.held == ("c", "a")
    assert pins.memory_used == {"a": 400, "c": 400}
    assert (pins.loads, pins.evictions) == (3, 1)


def test_as_many_are_evicted_as_it_takes_and_no_more() -> None:
    shelf = Shelf(a=300, b=300, c=300, d=600)
    pins = shelf.pins(1000, guessed=True)
    touch(pins, "a", "b", "c", "d")
    assert pins.held == ("d", "c")


@pytest.mark.parametrize("guessed", [False, True])
def test_room_is_made_before_the_load_if_the_size_is_known(guessed: bool) -> None:
    shelf = Shelf(a=600, b=600)
    pins = shelf.pins(1000, guessed=guessed)
    beside: list[tuple[str, ...]] = []
    shelf.on_load["b"] = lambda: beside.append(pins.held)
    touch(pins, "a", "b", "a", "b")
    assert beside == [() if guessed else ("a",), ()]  # an evicted model's size is remembered


def test_an_evicted_model_is_out_of_memory_before_the_next_is_loaded() -> None:
    class Circular(NullPipeline):
        """A pipeline that refers to itself, as modules and their hooks do."""

    def load(name: str, _: str) -> NullPipeline:
        pipeline = Circular(nbytes=600)
        object.__setattr__(pipeline, "itself", pipeline)
        alive.append([made for made in references if made() is not None])
        references.append(weakref.ref(pipeline))
        return pipeline

    references: list[weakref.ref[NullPipeline]] = []
    alive: list[list[object]] = []
    pins = Pins({"a": "", "b": ""}, load, 1000, size=lambda _: 600)
    gc.disable()
    try:
        touch(pins, "a", "b")
    finally:
        gc.enable()
    assert alive == [[], []]


def test_a_device_out_of_memory_loses_its_least_recently_used_model_and_loads_once_more() -> None:
    class Tensor:
        """An object loaded before the memory ran out."""

    def half_loaded() -> None:
        tensor = Tensor()
        references.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    references: list[weakref.ref[Tensor]] = []
    alive: list[object] = []
    steps = iter([half_loaded, lambda: alive.extend(made() for made in references)])
    shelf = Shelf(a=1, b=1, c=1)
    shelf.on_load["c"] = lambda: next(steps)()
    pins = shelf.pins()
    touch(pins, "a", "b", "c")
    assert pins.held == ("c", "b")
    assert alive == [None]


def test_a_device_out_of_memory_with_nobody_left_to_evict_fails_the_model() -> None:
    shelf = Shelf(a=1, b=1, c=1)
    error = torch.OutOfMemoryError("tried to allocate 2 GiB")
    shelf.on_load["c"] = raising(error, error, error)
    pins = shelf.pins()
    touch(pins, "a", "b")
    with pytest.raises(ModelError, match="model 'c': OutOfMemoryError: tried to allocate 2 GiB"):
        pins.use("c")
    assert pins.held == ()
    assert shelf.loading == ["a", "b", "c", "c", "c"]


def test_a_device_out_of_memory_evicts_no_model_in_use() -> None:
    shelf = Shelf(a=1, b=1)
    shelf.on_load["b"] = raising(torch.OutOfMemoryError("tried to allocate 2 GiB"))
    pins = shelf.pins()
    with pins.using("a"), pytest.raises(ModelError, match="tried to allocate"):
        pins.use("b")
    assert pins.held == ("a",)


def test_the_log_says_what_was_pinned_evicted_and_failed(caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf(a=600, b=600, c=600)
    shelf.on_load["c"] = raising(ModelError("no model_index.json"))
    pins = shelf.pins(1000)
    with caplog.at_level(logging.INFO, "workers.models.pins"), pytest.raises(ModelError):
        touch(pins, "a", "b", "c")
    assert caplog.messages == [
        "pinned model=a bytes=600 seconds=0.0",
        "unpinned model=a bytes=600",
        "pinned model=b bytes=600 seconds=0.0",
        "can't pin model=c: no model_index.json",
    ]


# --- many threads


def test_a_model_in_use_is_waited_for_and_not_evicted() -> None:
    shelf = Shelf(a=600, b=600)
    pins = shelf.pins(1000, guessed=True)
    pins.use("a")
    pins.use("a")
    waiting = start(pins.use, "b")
    until_it_waits(pins)
    pins.release("a")
    until_it_waits(pins)  # one user of it is left
    assert (pins.held, shelf.loading) == (("a",), ["a"])
    pins.release("a")
    assert waiting.result(SECONDS).name == "null:b"
    assert pins.held == ("b",)


def test_users_of_a_held_model_do_not_wait_for_a_load() -> None:
    shelf = Shelf(a=1, b=1)
    begun, go_on = threading.Event(), threading.Event()
    shelf.on_load["b"] = lambda: (begun.set(), go_on.wait(SECONDS))
    pins = shelf.pins()
    touch(pins, "a")
    loading = start(pins.use, "b")
    assert begun.wait(SECONDS)
    start(touch, pins, "a").result(SECONDS)
    assert pins.held == ("a",)
    assert not loading.done()
    go_on.set()
    loading.result(SECONDS)


def test_all_who_wait_for_a_model_share_one_load() -> None:
    shelf = Shelf(a=1)
    go_on = threading.Event()
    shelf.on_load["a"] = lambda: go_on.wait(SECONDS)
    pins = shelf.pins()
    uses = [start(pins.use, "a") for _ in range(8)]
    until_in_line(pins, 8)
    go_on.set()
    assert len({id(use.result(SECONDS)) for use in uses}) == 1
    assert shelf.loading == ["a"]
    assert pins._users["a"] == 8


def test_all_who_wait_for_a_model_hear_that_it_failed_and_the_next_in_line_is_loaded() -> None:
    def fail() -> None:
        go_on.wait(SECONDS)
        raise OSError("the share is away")

    go_on = threading.Event()
    shelf = Shelf(a=1, b=1)
    shelf.on_load["a"] = fail
    pins = shelf.pins()
    uses = [start(pins.use, "a") for _ in range(4)]
    until_in_line(pins, 4)
    next_in_line = start(pins.use, "b")
    until_in_line(pins, 1)
    go_on.set()
    for use in uses:
        with pytest.raises(ModelError, match="the share is away"):
            use.result(SECONDS)
    assert next_in_line.result(SECONDS).name == "null:b"
    assert shelf.loading == ["a", "b"]


def test_a_load_that_waits_for_memory_is_not_starved_by_new_users_of_the_model_to_evict() -> None:
    shelf = Shelf(a=600, b=600)
    pins = shelf.pins(1000, guessed=True)
    pins.use("a")
    waiting = start(pins.use, "b")
    until_it_waits(pins)
    until_in_line(pins, 1)
    late = [start(pins.use, "a") for _ in range(4)]
    until_in_line(pins, 4)
    pins.release("a")
    waiting.result(SECONDS)
    assert pins.held == ("b",)
    assert not any(use.done() for use in late)
    pins.release("b")
    assert {use.result(SECONDS).name for use in late} == {"null:a"}
    assert shelf.loading == ["a", "b", "a"]


def test_a_model_that_is_not_to_be_evicted_takes_new_users_during_a_wait() -> None:
    shelf = Shelf(a=400, b=400, c=400)
    pins = shelf.pins(1000, guessed=True)
    pins.use("a")
    pins.use("b")
    waiting = start(pins.use, "c")
    until_it_waits(pins)
    start(touch, pins, "b").result(SECONDS)
    assert not waiting.done()
    pins.release("a")
    waiting.result(SECONDS)
    assert pins.held == ("c", "b")


def test_a_model_whose_eviction_became_unnecessary_serves_its_waiting_users() -> None:
    shelf = Shelf(a=400, b=400, c=400)
    pins = shelf.pins(1000, guessed=True)
    pins.use("a")
    pins.use("b")
    waiting = start(pins.use, "c")
    until_it_waits(pins)
    until_in_line(pins, 1)
    late = start(pins.use, "a")
    until_in_line(pins, 1)
    pins.release("b")  # and not a, the model chosen for eviction
    waiting.result(SECONDS)
    late.result(SECONDS)
    assert shelf.loading == ["a", "b", "c"]
    assert pins._users == Counter(a=2, b=0, c=1)


def test_models_that_can_not_be_held_together_take_turns_until_all_are_served() -> None:
    shelf = Shelf(a=600, b=600, c=600)
    pins = shelf.pins(1000, guessed=True)
    together = threading.Barrier(12)

    def use(name: str) -> int:
        together.wait(SECONDS)
        for _ in range(50):
            with pins.using(name) as pipeline:
                assert pipeline.name == f"null:{name}"
                assert pins.held == (name,)
        return 50

    ends: list[Future[int]] = [start(use, name) for name in "abc" * 4]
    assert sum(end.result(SECONDS) for end in ends) == 600
    assert pins.loads == len(shelf.loading) == pins.evictions + 1
    assert sum(pins._users.values()) == 0


# --- the device of the models


def test_the_cpu_renders_in_float32() -> None:
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu
    assert choose_dtype(None, cpu) == torch.float32
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_here_is_named(device: str) -> None:
    with pytest.raises(ModelError, match=f"no device '{device}'"):
        choose_device(device)


def test_a_precision_nobody_knows_is_named() -> None:
    with pytest.raises(ModelError, match="no precision 'int8'; known are float32, float16, bfloat16"):
        choose_dtype("int8", torch.device("cpu"))

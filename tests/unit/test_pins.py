import pytest
import torch

from farm.errors import ModelError
from workers.device import choose_device, choose_dtype
from workers.pins import Pins
from workers.pipelines.null import NullPipeline

CPU = torch.device("cpu")


def test_models_are_held_by_their_names_in_order() -> None:
    pins = Pins.load({"b": "null:?width=128", "a": "null:"}, CPU, torch.float32)
    assert pins.names == ("b", "a")
    assert pins.get("b").native_size == (128, 64)
    assert pins.memory_used == {"b": 0, "a": 0}


def test_a_model_that_is_not_held_is_named_with_those_that_are() -> None:
    with pytest.raises(ModelError, match="model 'c' is not held here; held: a"):
        Pins.load({"a": "null:"}, CPU, torch.float32).get("c")


@pytest.mark.parametrize("source", ["null:?width=wide", "null:?depth=3", "null:?width", "null:wide"])
def test_a_source_that_can_not_be_loaded_is_named_with_its_model(source: str) -> None:
    with pytest.raises(ModelError, match=r"model 'a': null:.* takes numbers for seconds_per_step, width, height"):
        Pins.load({"a": source}, CPU, torch.float32)


def test_models_that_do_not_fit_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.pins.load", lambda *_: NullPipeline(nbytes=600))
    sources = {"a": "null:", "b": "null:"}
    assert Pins.load(sources, CPU, torch.float32, memory_bytes=1200).memory_used == {"a": 600, "b": 600}
    with pytest.raises(ModelError, match=r"model 'b' does not fit beside a \(600 bytes\): 1,200 bytes are more"):
        Pins.load(sources, CPU, torch.float32, memory_bytes=1199)


def test_a_device_that_runs_out_of_memory_while_loading_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr("workers.pins.load", load)
    with pytest.raises(ModelError, match="model 'a' does not fit beside nothing: tried to allocate 2 GiB"):
        Pins.load({"a": "null:"}, CPU, torch.float32)


def test_the_cpu_renders_in_float32() -> None:
    assert choose_device("cpu") == CPU
    assert choose_dtype(None, CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_here_is_named(device: str) -> None:
    with pytest.raises(ModelError, match=f"no device '{device}'"):
        choose_device(device)


def test_a_precision_nobody_knows_is_named() -> None:
    with pytest.raises(ModelError, match="no precision 'int8'; known are float32, float16, bfloat16"):
        choose_dtype("int8", CPU)

"""The error with which a request ends, and the objects that the error keeps alive."""

import gc
import weakref

import pytest
import torch

from farm.errors import BadRequest, FarmError, OutOfMemory, RenderError
from workers.render.failures import as_failure, first_line, shape_text


def test_an_error_of_the_farm_stays_itself() -> None:
    error = BadRequest("no such size")
    assert as_failure(error, "encode it") is error


def test_a_lack_of_memory_says_during_what_and_only_its_first_line() -> None:
    failure = as_failure(torch.OutOfMemoryError("CUDA out of memory.\n12 GiB are reserved"), "decode 64x64")
    assert isinstance(failure, OutOfMemory)
    assert str(failure) == "no memory to decode 64x64: CUDA out of memory."


def test_any_other_error_is_named_with_its_class_and_is_the_cause() -> None:
    error = ZeroDivisionError("division by zero")
    failure = as_failure(error, "denoise it")
    assert isinstance(failure, RenderError)
    assert str(failure) == "ZeroDivisionError: division by zero"
    assert failure.__cause__ is error


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, ValueError])
def test_a_failure_keeps_no_tensor_of_the_frames_that_it_came_through(kind: type[Exception]) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def forward() -> None:
        latents = torch.zeros(8)
        held.append(weakref.ref(latents))
        raise kind("oops")

    def ended() -> FarmError:
        try:
            forward()
        except kind as error:
            return as_failure(error, "denoise it")
        raise AssertionError("it did not fail")

    failure = ended()
    gc.collect()
    assert held[0]() is None
    assert failure.__cause__ is not None


def test_the_first_line_of_an_error_may_be_all_of_it() -> None:
    assert first_line(ValueError("one")) == "one"
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == ""


def test_a_shape_is_told_as_people_write_it() -> None:
    assert shape_text((4, 64, 64)) == "4x64x64"

"""The errors with which requests end."""

import traceback
from collections.abc import Sequence

import torch

from farm.errors import FarmError, OutOfMemory, RenderError


def as_failure(error: Exception, doing: str) -> FarmError:
    """The error with which a request ends after an exception while it was `doing` something."""
    if isinstance(error, FarmError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return caused(OutOfMemory(f"no memory to {doing}: {first_line(error)}"), error)
    return caused(RenderError(f"{type(error).__name__}: {error}"), error)


def caused(failure: FarmError, cause: Exception) -> FarmError:
    """An error with its cause, without the variables in the cause's frames."""
    # They would keep tensors alive as long as the error, which matters after an OutOfMemoryError.
    traceback.clear_frames(cause.__traceback__)
    failure.__cause__ = cause
    return failure


def first_line(error: Exception) -> str:
    """The first line of an error: those of torch continue with the state of its allocator."""
    return str(error).partition("\n")[0]


def shape_text(shape: Sequence[int]) -> str:
    """A shape as text: 4x64x64."""
    return "x".join(map(str, shape))

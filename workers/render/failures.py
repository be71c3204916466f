"""What a request ends with when something was raised for it."""

import traceback
from collections.abc import Sequence

import torch

from farm.errors import FarmError, OutOfMemory, RenderError


def as_failure(error: Exception, doing: str) -> FarmError:
    """What a request ends with that raised this while it was `doing` something."""
    if isinstance(error, FarmError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return caused(OutOfMemory(f"no memory to {doing}: {first_line(error)}"), error)
    return caused(RenderError(f"{type(error).__name__}: {error}"), error)


def caused(failure: FarmError, cause: Exception) -> FarmError:
    """A failure with its cause, whose frames are let go."""
    # They would keep their tensors alive as long as somebody holds the error: bad news after an OutOfMemoryError.
    traceback.clear_frames(cause.__traceback__)
    failure.__cause__ = cause
    return failure


def first_line(error: Exception) -> str:
    """What an error says in short: torch's go on with the state of its allocator."""
    return str(error).partition("\n")[0]


def shape_text(shape: Sequence[int]) -> str:
    """A shape as a person writes it: 4x64x64."""
    return "x".join(map(str, shape))

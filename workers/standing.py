"""What a worker says of itself while it runs: which models it holds now, and how much memory its device has left."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from farm.records import HELD, MEMORY

RESTATE_SECONDS = 10.0
_PART = 100
"""Memory is told in hundredths of what there is: a little more or less is no news."""


def standing(
    models: Sequence[Mapping[str, Any]], held: Collection[str], memory: tuple[int, int] | None
) -> tuple[Mapping[str, Any], ...]:
    """Descriptions of models with what is to be said now: equal to these if there is nothing new.

    `memory` is the device's, in bytes: used, and in all; None if that can't be told.
    """
    now: dict[str, Any] = {}
    if memory is not None:
        used, there_is = memory
        now[MEMORY] = [min(there_is, there_is * round(_PART * used / max(1, there_is)) // _PART), there_is]
    return tuple({**model, HELD: model["name"] in held, **now} for model in models)

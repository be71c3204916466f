"""What a worker says of itself while it runs: which models it holds now, and how much memory its device has left."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from farm.jobs.records import HELD, MEMORY
from workers.render.pipeline import Pipeline

RESTATE_SECONDS = 10.0
_PART = 100
"""Memory is told in hundredths of what there is: a little more or less is no news."""


def facts(pipeline: Pipeline) -> Mapping[str, object]:
    """What is known of a model once it was loaded."""
    return {
        "sha256": pipeline.sha256,
        "bytes": pipeline.nbytes,
        "family": pipeline.family,
        "samplers": pipeline.samplers,
    }


def standing(
    models: Sequence[Mapping[str, Any]],
    loaded: Mapping[str, Mapping[str, object]],
    held: Collection[str],
    memory: tuple[int, int] | None,
) -> tuple[Mapping[str, Any], ...]:
    """Descriptions of models with what is to be said now: equal to these if there is nothing new.

    `loaded` has the `facts` of all models that were ever loaded here. `memory` is the device's, in bytes: used, and in
    all; None if that can't be told.
    """
    now: dict[str, Any] = {}
    if memory is not None:
        used, there_is = memory
        now[MEMORY] = [min(there_is, there_is * round(_PART * used / max(1, there_is)) // _PART), there_is]
    return tuple({**model, **loaded.get(model["name"], {}), HELD: model["name"] in held, **now} for model in models)

"""Pictures that are too large for whoever is there: what one takes, and what the workers have room for."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from farm.schema import JobRow

MOST = "most_row_pixels"
"""What a worker's model is described with when it is known: a picture of more `RenderSpec.row_pixels` does not fit."""


def fits(most: int) -> sa.ColumnElement[bool]:
    """That a job has no more `row_pixels` than that; also one of its model's own size, which only workers know."""
    width, height = (JobRow.spec[name].as_integer() for name in ("width", "height"))
    guided = (JobRow.spec[name].as_float() > 1 for name in ("guidance_scale", "true_cfg_scale"))
    size = width * height * sa.case((sa.or_(*guided), 2), else_=1)
    return sa.or_(width.is_(None), height.is_(None), size <= most)


def rooms(workers: Iterable[Sequence[Mapping[str, Any]]]) -> dict[str, int]:
    """The most `row_pixels` that any of the workers has room for, by model, given the models that each serves.

    A model is left out while one of its workers has not found that out.
    """
    found: dict[str, int] = {}
    unknown: set[str] = set()
    for models in workers:
        for model in models:
            if model.get(MOST) is None:
                unknown.add(model["name"])
            else:
                found[model["name"]] = max(model[MOST], found.get(model["name"], 0))
    return {name: most for name, most in found.items() if name not in unknown}

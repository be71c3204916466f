"""What a worker has memory for, as it describes each of its models, and whether a picture is within that."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from farm.specs.spec import RenderSpec

MOST = "most_row_pixels"
"""What a worker's model is described with when it is known: a picture of more `RenderSpec.row_pixels` does not fit."""
OWN_ROWS = "own_rows"
"""And how many rows fit of a picture of the model's own size, which who submits does not know; all, if left out."""
_ALL_ROWS = 2


class Room(NamedTuple):
    """What there is memory for, of one model."""

    most: int
    """In `RenderSpec.row_pixels`."""
    own_rows: int = _ALL_ROWS
    """Of a picture of the model's own size."""

    def has(self, spec: RenderSpec) -> bool:
        """Whether there may be memory for a picture; with only one of its sides given, there may."""
        if spec.width is None and spec.height is None:
            return spec.row_pixels(1, 1) <= self.own_rows
        return spec.width is None or spec.height is None or spec.row_pixels(0, 0) <= self.most


def room_of(model: Mapping[str, Any]) -> Room | None:
    """What a worker has room for, by its description of a model; None if it has not found that out."""
    return None if model.get(MOST) is None else Room(model[MOST], model.get(OWN_ROWS, _ALL_ROWS))

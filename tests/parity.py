"""Pictures of the farm's engine as floats, before they are rounded to 8 bits, for `benchmarks.parity`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from farm.specs.spec import RenderSpec
from workers.engine import decoder
from workers.engine.engine import Engine
from workers.models.pins import Pins
from workers.render.pipeline import Pipeline
from workers.render.request import RenderRequest


def draw(pipeline: Pipeline, specs: Sequence[RenderSpec], slots: int, **options: bool) -> list[np.ndarray]:
    """Return the pictures of the specs, (height, width, 3) in [0, 1], from an engine with that many slots."""
    pictures: dict[str, np.ndarray] = {}
    rendered = decoder.rendered

    def watched(request: RenderRequest, pipeline: Pipeline, picture: torch.Tensor, *others: Any) -> Any:
        pictures[request.id] = picture.permute(1, 2, 0).numpy()
        return rendered(request, pipeline, picture, *others)

    engine = Engine(Pins.of({"tiny": pipeline}), slots=slots, line=len(specs), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "rendered", watched)
        engine.start()
        futures = [engine.submit(RenderRequest(str(place), spec)) for place, spec in enumerate(specs)]
        for future in futures:
            future.result()
        engine.stop()
    return [pictures[str(place)] for place in range(len(specs))]

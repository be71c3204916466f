"""Warms up a worker's models before their first job."""

import logging

from farm.errors import BadImage, ModelError, RenderError
from farm.specs.spec import RenderSpec
from workers.engine.engine import Engine
from workers.models.pins import Pins
from workers.render.request import RenderRequest

log = logging.getLogger(__name__)


def warm(engine: Engine, pins: Pins) -> None:
    """Render two steps with every loaded model, and so measure its forwards, so that the first job is not slow.

    The engine must be running. Raises `ModelError` for a model that can't render.
    """
    for name in pins.held:
        spec = RenderSpec(prompt="warm", num_inference_steps=2, seed=0, model=name)
        try:
            engine.submit(RenderRequest(f"warm {name}", spec)).result()
        except BadImage as error:  # a black picture after two steps is not a fault of the model
            log.debug("warming model=%s: %s", name, error)
        except RenderError as error:
            raise ModelError(f"model {name!r} can't render: {error}") from error

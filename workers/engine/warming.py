"""Models made ready before their first job."""

import logging

from farm.errors import BadImage, ModelError, RenderError
from farm.specs.spec import RenderSpec
from workers.engine.engine import Engine
from workers.models.pins import Pins
from workers.render.request import RenderRequest

log = logging.getLogger(__name__)


def warm(engine: Engine, pins: Pins) -> None:
    """Render two steps with every model held, and measure its forwards, so that the first job is not slow.

    The engine runs already. Raises `ModelError` for a model that can't render.
    """
    for name in pins.held:
        spec = RenderSpec(prompt="warm", num_inference_steps=2, seed=0, model=name)
        try:
            engine.submit(RenderRequest(f"warm {name}", spec)).result()
        except BadImage as error:  # a picture of next to nothing in two steps is no fault of the model's
            log.debug("warming model=%s: %s", name, error)
        except RenderError as error:
            raise ModelError(f"model {name!r} can't render: {error}") from error

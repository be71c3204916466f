"""Encodes a request's texts and draws its first noise, in a thread beside the render loop."""

import logging
from collections.abc import Callable

import torch

from farm.errors import EngineFailed, FarmError
from workers.render.device import SideThread
from workers.render.failures import as_failure
from workers.render.pipeline import Pipeline
from workers.render.request import RenderRequest

log = logging.getLogger(__name__)


class Encoder:
    """A thread that encodes texts and draws first noise; calls `on_lost` when the device is lost."""

    def __init__(self, on_lost: Callable[[Exception], None]) -> None:
        self.side = SideThread("encoder")
        self._on_lost = on_lost

    def prepare(self, pipeline: Pipeline, request: RenderRequest) -> tuple[int, ...]:
        """Plan and encode a request; returns the shape of its latents. Every error is a `FarmError`."""
        try:
            with torch.inference_mode():
                shape = pipeline.plan(request)
                self.side.run(pipeline.device, lambda: _encode(pipeline, request))
        except torch.AcceleratorError as error:
            self._on_lost(error)
            raise EngineFailed(f"the device is lost: {error}") from error
        except FarmError:
            raise
        except Exception as error:
            raise as_failure(error, f"encode the texts of its {request.rows} rows, before step 1") from error
        return shape


def _encode(pipeline: Pipeline, request: RenderRequest) -> None:
    stopped = request.resume
    if stopped is not None and (stopped.model_sha256, stopped.spec) != (pipeline.sha256, request.spec):
        log.warning("%s starts from its first step: its checkpoint is of another model or spec", request.id)
        request.resume = None
    pipeline.encode(request)
    if pipeline.device.type == "cuda":
        for tensor in (request.latents, *request.history, *request.conditioning.values()):
            tensor.record_stream(torch.cuda.default_stream(pipeline.device))

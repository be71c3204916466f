"""Decodes a request's last latents into its picture, in a thread beside the render loop."""

import logging
import threading
import time
from collections.abc import Callable

import torch
from PIL import Image

from farm.errors import BadImage, FarmError
from workers.render.device import SideThread
from workers.render.failures import as_failure, shape_text
from workers.render.pipeline import Pipeline
from workers.render.request import Rendered, RenderRequest, Snapshot
from workers.sampling import tables

log = logging.getLogger(__name__)


class Decoder:
    """A thread that decodes denoised requests, batched by pipeline and shape.

    It calls `on_decoded` with each request's picture or error, and `on_lost` when the device is lost.
    """

    def __init__(
        self, on_decoded: Callable[[RenderRequest, Rendered | FarmError], None], on_lost: Callable[[Exception], None]
    ) -> None:
        self.side = SideThread("decoder")
        self._on_decoded, self._on_lost = on_decoded, on_lost
        self._waiting: list[tuple[Pipeline, RenderRequest, torch.cuda.Event | None]] = []
        self._lock = threading.Lock()

    def add(self, pipeline: Pipeline, request: RenderRequest, *, idle: bool = False) -> None:
        """Queue a denoised request, from the thread that denoised it; returns at once.

        On the CPU, an `idle` calling thread decodes instead, since it has all the cores.
        """
        # A GPU works asynchronously: the event marks the end of the last step.
        event = torch.cuda.current_stream().record_event() if request.latents.is_cuda else None
        with self._lock:
            self._waiting.append((pipeline, request, event))
        if idle and event is None:
            self._decode()
        else:
            self.side.start(pipeline.device, self._decode)

    def discard(self, request: RenderRequest) -> bool:
        """Remove a request that waits to be decoded; False if it is being decoded or unknown."""
        with self._lock:
            left = [entry for entry in self._waiting if entry[1] is not request]
            discarded = len(left) < len(self._waiting)
            self._waiting = left
        return discarded

    def preview(self, pipeline: Pipeline, snapshot: Snapshot, *, vae: bool) -> Image.Image:
        """The picture of a snapshot's latents, decoded after the waiting requests."""
        request = RenderRequest("preview", snapshot.spec, resume=snapshot)
        device = snapshot.latents.device
        # As in `add`: the step that computes them may not have ended.
        event = torch.cuda.default_stream(device).record_event() if snapshot.latents.is_cuda else None

        def draw() -> torch.Tensor:
            if event is not None:
                torch.cuda.current_stream().wait_event(event)
            pipeline.plan(request)
            request.step_index, request.latents = snapshot.step_index, snapshot.latents
            latents = tables.visible(request)
            return (pipeline.decode(latents) if vae else pipeline.preview(latents))[0].float().cpu()

        return as_image(self.side.run(pipeline.device, draw))

    def _decode(self) -> None:
        with self._lock:
            if not self._waiting:
                return  # an earlier call decoded it with another request
            pipeline, first, _ = self._waiting[0]
            same = [
                (request, event)
                for other, request, event in self._waiting
                if other is pipeline and request.latents.shape == first.latents.shape
            ]
            taken = same[:1] if first.deterministic else [one for one in same if not one[0].deterministic]
            requests = [request for request, _ in taken]
            self._waiting = [entry for entry in self._waiting if entry[1] not in requests]
            more = bool(self._waiting)
        try:
            for request, event in taken:
                if event is not None:
                    torch.cuda.current_stream().wait_event(event)
                    request.latents.record_stream(torch.cuda.current_stream())
            pictures = self._together(pipeline, requests)
            for place, request in enumerate(requests):
                try:
                    picture = pictures[place] if pictures else pipeline.decode(request.latents)[0]
                    self._on_decoded(request, rendered(request, pipeline, picture, self.side.answered))
                except torch.AcceleratorError:
                    raise
                except Exception as error:  # noqa: BLE001 - only the requests that cause it may fail
                    doing = f"decode {shape_text(request.latents.shape[1:])} latents after step {request.steps_done}"
                    self._on_decoded(request, as_failure(error, doing))
        except Exception as error:  # noqa: BLE001 - reported to the loop
            self._on_lost(error)
        if more:
            self.side.start(pipeline.device, self._decode)

    def _together(self, pipeline: Pipeline, requests: list[RenderRequest]) -> list[torch.Tensor]:
        """The pictures of requests decoded in one batch; empty for a single request, or if that fails."""
        if len(requests) == 1:
            return []
        try:
            return list(pipeline.decode(torch.cat([request.latents for request in requests])))
        except torch.AcceleratorError:
            raise
        except Exception:
            log.warning("decoding %d pictures at once failed; now one by one", len(requests), exc_info=True)
            return []


def rendered(
    request: RenderRequest, pipeline: Pipeline, picture: torch.Tensor, answered: Callable[[], None] = lambda: None
) -> Rendered:
    """The result of a request, from its decoded picture, float (3, height, width) in [0, 1].

    `answered` is called after each frame of a trajectory, to show that the device does not hang. Raises `BadImage`
    for a picture that is black or not finite.
    """
    step = int(request.first_bad) if request.first_bad is not None else 0
    if step:
        raise BadImage(f"NaN or infinity in the latents after step {step}")
    if not picture.isfinite().all():
        raise BadImage(f"NaN or infinity in the picture decoded after step {request.steps_done}")
    image = as_image(picture)
    if image.getbbox() is None:
        raise BadImage(f"the picture decoded after step {request.steps_done} is black all over")
    answered()
    frames = []
    for latents in request.frames[:-1]:
        frames.append(as_image(pipeline.decode(latents)[0]))
        answered()
    return Rendered(
        image=image,
        model=request.spec.model,
        model_sha256=pipeline.sha256,
        width=image.width,
        height=image.height,
        steps=request.spec.num_inference_steps,
        scheduler=request.sampling.name,
        device=str(pipeline.device),
        dtype=str(pipeline.dtype).removeprefix("torch."),
        render_seconds=time.monotonic() - (request.started or 0),
        device_seconds=request.device_seconds,
        warnings=tuple(request.warnings),
        frames=(*frames, image) if request.frames else (),
    )


def as_image(picture: torch.Tensor) -> Image.Image:
    """A picture of floats in [0, 1], (3, height, width), as 8-bit RGB."""
    return Image.fromarray(picture.mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())

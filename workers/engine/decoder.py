"""From a request's last latents to its picture, beside the render loop."""

import logging
import threading
import time
from collections.abc import Callable

import torch
from PIL import Image

from farm.errors import BadImage, FarmError
from workers.render.device import Side
from workers.render.failures import as_failure, shown
from workers.render.pipeline import Pipeline
from workers.render.request import Rendered, RenderRequest, Snapshot
from workers.sampling import tables

log = logging.getLogger(__name__)


class Decoder:
    """One thread that decodes what has been denoised: all that waits of one pipeline and shape at once.

    `done` is told each request's picture or error, `lost` that the device is gone.
    """

    def __init__(
        self, done: Callable[[RenderRequest, Rendered | FarmError], None], lost: Callable[[Exception], None]
    ) -> None:
        self.side = Side("decoder")
        self._done, self._lost = done, lost
        self._waiting: list[tuple[Pipeline, RenderRequest, torch.cuda.Event | None]] = []
        self._lock = threading.Lock()

    def add(self, pipeline: Pipeline, request: RenderRequest, *, idle: bool = False) -> None:
        """Take a denoised request, from the thread that denoised it; returns at once.

        Unless that thread is `idle` otherwise, and on the CPU: then it decodes, for it has all the cores.
        """
        # On a GPU its last step is only asked for so far; this says when it is done.
        event = torch.cuda.current_stream().record_event() if request.latents.is_cuda else None
        with self._lock:
            self._waiting.append((pipeline, request, event))
        if idle and event is None:
            self._decode()
        else:
            self.side.start(pipeline.device, self._decode)

    def drop(self, request: RenderRequest) -> bool:
        """Whether a request waited here to be decoded, and does no more; False while it is being decoded."""
        with self._lock:
            left = [entry for entry in self._waiting if entry[1] is not request]
            dropped = len(left) < len(self._waiting)
            self._waiting = left
        return dropped

    def picture(self, pipeline: Pipeline, snapshot: Snapshot, *, vae: bool) -> Image.Image:
        """What the latents of a snapshot show, after what waits to be decoded."""
        request = RenderRequest("preview", snapshot.spec, resume=snapshot)
        device = snapshot.latents.device
        # As in `add`: the step that makes them may only be asked for so far.
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
                return  # an earlier call took it along
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
                    self._done(request, rendered(request, pipeline, picture, self.side.answered))
                except torch.AcceleratorError:
                    raise
                except Exception as error:  # noqa: BLE001 - a neighbour must not suffer from it
                    doing = f"decode {shown(request.latents.shape[1:])} latents after step {request.steps_done}"
                    self._done(request, as_failure(error, doing))
        except Exception as error:  # noqa: BLE001 - the loop has to know
            self._lost(error)
        if more:
            self.side.start(pipeline.device, self._decode)

    def _together(self, pipeline: Pipeline, requests: list[RenderRequest]) -> list[torch.Tensor]:
        """Their pictures, if they can be decoded at once."""
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
    """The finished picture of a request from what the VAE made, float (3, height, width) in [0, 1].

    `answered` is called whenever the device has made something of it: the frames of a trajectory are many. Raises
    `BadImage` if there is nothing in it.
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

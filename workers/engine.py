"""The render loop of a worker: schedule, forward, step, finish."""

import logging
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from PIL import Image

from farm.errors import (
    BadImage,
    EngineFailed,
    FarmError,
    ModelError,
    RenderCancelled,
    RenderError,
    RenderHandedBack,
)
from farm.spec import RenderSpec
from workers.pins import Pins
from workers.pipelines import Pipeline
from workers.request import Rendered, RenderRequest
from workers.step_scheduler import ForwardKey, StepScheduler

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far one request is."""

    steps_done: int
    steps_total: int
    """In the steps its spec asked for."""
    seconds: float | None
    """Since it took its slot; None while it waits for one."""


@dataclass(eq=False)
class _Render:
    """A request with what the engine needs beside it."""

    request: RenderRequest
    pipeline: Pipeline
    future: Future[Rendered] = field(default_factory=Future)


class Engine:
    """One thread that owns the models and renders many requests at once.

    Requests join and leave between two steps; each forward carries every running request of one `ForwardKey`,
    each at its own timestep (continuous batching, Orca, OSDI 2022). All methods may be called from any thread.
    """

    def __init__(self, pins: Pins, slots: int = 8, line: int = 64) -> None:
        self._pins = pins
        self._scheduler = StepScheduler(slots, line)
        self._renders: dict[str, _Render] = {}
        # Guards everything above and below; the loop never holds it while a model runs. Whoever takes a render
        # out of `_renders` resolves its future, and nobody else does.
        self._changed = threading.Condition()
        self._accepting = False
        self._stopping = False
        self._failure: BaseException | None = None
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    # --- what other threads call

    def start(self) -> None:
        """Start the loop, once; requests are taken from now on."""
        with self._changed:
            self._accepting = True
        self._thread.start()

    @property
    def failed(self) -> BaseException | None:
        """What broke the loop for good, if anything did; its worker should be replaced."""
        return self._failure

    @property
    def healthy(self) -> bool:
        """Whether the loop runs and takes requests."""
        return self._thread.is_alive() and self._accepting

    @property
    def busy_seconds(self) -> float:
        """How long the step under way has taken so far, 0 when idle. One that never ends is a hung device."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def submit(self, request: RenderRequest, timeout: float | None = None) -> Future[Rendered]:
        """Put a request in line; its future ends with the picture or with a `FarmError`.

        Blocks while the line is full, `timeout` seconds at most. A request with the id of one that is still here
        is a newer attempt and takes its place: the older one ends with `RenderCancelled`. The future's own `cancel`
        does nothing; use the engine's.

        Raises `ModelError` for a model not held, `BadRequest` for a size it can't draw, `RenderHandedBack` when the
        engine drains, has not started or has no room in time, and `EngineFailed` when its loop broke.
        """
        spec = request.spec
        pipeline = self._pins.get(spec.model)
        render = _Render(request, pipeline)
        render.future.set_running_or_notify_cancel()
        key = ForwardKey(spec.model, pipeline.latent_shape(spec), str(pipeline.dtype))
        with self._changed:
            room = self._changed.wait_for(lambda: not (self._accepting and self._scheduler.full), timeout)
            if self._failure is not None:
                raise EngineFailed(f"the render loop broke: {self._failure!r}") from self._failure
            if not (room and self._accepting):
                raise RenderHandedBack("the engine takes no more requests" if room else "the line stayed full")
            if older := self._renders.get(request.id):
                self._end(older, RenderCancelled(f"{request.id}: a newer attempt took its place"))
            self._scheduler.enqueue(request.id, key)
            self._renders[request.id] = render
            self._changed.notify_all()
        return render.future

    def cancel(self, request_id: str) -> bool:
        """End a request with `RenderCancelled`, at once; it is in no forward that begins later. False if unknown."""
        with self._changed:
            render = self._renders.get(request_id)
        return render is not None and self._end(render, RenderCancelled(f"{request_id} was cancelled"))

    def progress(self) -> dict[str, Progress]:
        """How far every request here is, waiting or running, by id. Never waits for a step."""
        now = time.monotonic()
        with self._changed:
            requests = [render.request for render in self._renders.values()]
        return {
            request.id: Progress(
                request.steps_done,
                request.spec.num_inference_steps,
                None if request.started is None else now - request.started,
            )
            for request in requests
        }

    def drain(self, seconds: float) -> None:
        """Take no more requests, and end those here within that time; returns when none is left.

        Those still in line end with `RenderHandedBack` at once, so that another worker can start them; those that
        hold a slot go on, and end with `RenderHandedBack` when the time is up.
        """
        with self._changed:
            self._accepting = False
            self._changed.notify_all()
            renders = list(self._renders.values())
            waiting = [self._renders[request_id] for request_id in self._scheduler.waiting]
        for render in waiting:
            self._end(render, RenderHandedBack(f"{render.request.id}: its worker drains"))
        futures = [render.future for render in renders]
        wait(futures, timeout=seconds)
        for render in renders:
            self._end(render, RenderHandedBack(f"{render.request.id}: not done in time, and its worker drains"))
        wait(futures)

    def stop(self, timeout: float = 10.0) -> None:
        """Hand back whatever is here and end the loop, waiting `timeout` seconds at most for the step under way."""
        self.drain(0)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def warm(self) -> None:
        """Render two steps with every model, so that the first job is not slow; call it after `start`.

        Raises `ModelError` for a model that can't render.
        """
        for name in self._pins.names:
            spec = RenderSpec(prompt="warm", num_inference_steps=2, seed=0, model=name)
            try:
                self.submit(RenderRequest(f"warm {name}", spec)).result()
            except RenderError as error:
                raise ModelError(f"model {name!r} can't render: {error}") from error

    # --- the loop

    def _loop(self) -> None:
        try:
            with torch.inference_mode():
                while self._work_to_do():
                    self._step_began = time.monotonic()
                    self._step()
                    self._step_began = None
        except Exception as error:
            log.exception("the render loop broke")
            with self._changed:
                self._failure, self._accepting, self._step_began = error, False, None
                self._changed.notify_all()
                renders = list(self._renders.values())
            for render in renders:
                self._end(render, _caused(EngineFailed(f"the render loop broke: {error!r}"), error))

    def _work_to_do(self) -> bool:
        """Wait for a request; False when the engine stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._renders or self._stopping)
            return not self._stopping

    def _step(self) -> None:
        renders = self._schedule()
        outputs = self._forward(renders)
        self._postprocess(renders, outputs)

    def _schedule(self) -> list[_Render]:
        """Let the head of the line take the free slots, and choose who shares the next forward."""
        with self._changed:
            joining = [self._renders[request_id] for request_id in self._scheduler.admit()]
            self._changed.notify_all()  # the line has room again
        for render in joining:
            with self._alone(render):
                render.request.started = time.monotonic()
                render.pipeline.encode(render.request)
        with self._changed:
            return [self._renders[request_id] for request_id in self._scheduler.next_forward()]

    def _forward(self, renders: list[_Render]) -> list[torch.Tensor]:
        """The outputs of one forward for all of them; none if it raised, which ends all of them."""
        if not renders:
            return []
        try:
            return renders[0].pipeline.denoise([render.request for render in renders])
        except torch.AcceleratorError:
            raise
        except Exception as error:
            log.exception("a forward of %d requests failed", len(renders))
            for render in renders:
                self._end(render, _caused(EngineFailed(f"the forward failed: {error!r}"), error))
            return []

    def _postprocess(self, renders: list[_Render], outputs: list[torch.Tensor]) -> None:
        """Step each request with its output, and finish those that are at their end."""
        denoised = []
        for render, output in zip(renders, outputs, strict=False):
            request = render.request
            with self._alone(render):
                render.pipeline.step(request, output)
                request.step_index += 1
                # Asking a GPU for a number waits for it, so there only the last step is looked at.
                if (request.denoised or request.latents.is_cpu) and not request.latents.isfinite().all():
                    raise BadImage(f"NaN or infinity in the latents after step {request.steps_done}")
                if request.denoised:
                    denoised.append(render)
        if denoised:
            self._finish(denoised)

    def _finish(self, renders: list[_Render]) -> None:
        """Decode the pictures, all at once if that works, and end the requests."""
        pipeline = renders[0].pipeline
        pictures: list[torch.Tensor] | None = None
        try:
            pictures = list(pipeline.decode([render.request for render in renders]))
        except torch.AcceleratorError:
            raise
        except Exception:
            log.warning("decoding %d pictures at once failed; now one by one", len(renders), exc_info=True)
        for index, render in enumerate(renders):
            with self._alone(render):
                picture = pictures[index] if pictures else pipeline.decode([render.request])[0]
                self._end(render, _rendered(render, picture))

    @contextmanager
    def _alone(self, render: _Render) -> Iterator[None]:
        """Whatever is raised in here ends this request and no other."""
        try:
            yield
        except torch.AcceleratorError:  # the device is lost for everybody
            raise
        except FarmError as error:
            self._end(render, error)
        except Exception as error:  # noqa: BLE001 - a neighbour must not suffer from it
            self._end(render, _caused(RenderError(f"{type(error).__name__}: {error}"), error))

    def _end(self, render: _Render, outcome: Rendered | FarmError) -> bool:
        """Take a request out and resolve its future; False, and nothing done, if somebody has before."""
        with self._changed:
            if self._renders.get(render.request.id) is not render:
                return False
            del self._renders[render.request.id]
            self._scheduler.leave(render.request.id)
            self._changed.notify_all()
        if isinstance(outcome, Rendered):
            render.future.set_result(outcome)
        else:
            render.future.set_exception(outcome)
        return True


def _rendered(render: _Render, picture: torch.Tensor) -> Rendered:
    request, pipeline = render.request, render.pipeline
    if not picture.isfinite().all():
        raise BadImage("NaN or infinity in the decoded picture")
    pixels = picture.mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    height, width, _ = pixels.shape
    return Rendered(
        image=Image.fromarray(pixels),
        model=request.spec.model,
        model_sha256=pipeline.sha256,
        width=width,
        height=height,
        steps=request.spec.num_inference_steps,
        scheduler="none" if request.scheduler is None else type(request.scheduler).__name__,
        device=str(pipeline.device),
        dtype=str(pipeline.dtype).removeprefix("torch."),
        render_seconds=time.monotonic() - (request.started or 0),
        warnings=tuple(request.warnings),
    )


def _caused(failure: FarmError, cause: Exception) -> FarmError:
    # Its frames would keep their tensors alive as long as somebody holds the error: bad news after an OutOfMemoryError.
    traceback.clear_frames(cause.__traceback__)
    failure.__cause__ = cause
    return failure

"""The render loop of a worker: schedule, forward, step, finish."""

import logging
import threading
import time
import traceback
from concurrent.futures import Future, wait

import torch
from PIL import Image

from farm.errors import BadImage, EngineFailed, FarmError, OutOfMemory, RenderCancelled, RenderHandedBack
from workers.engine.active_render import Ending, Render, cancel
from workers.engine.decoder import Decoder
from workers.engine.encoder import Encoder
from workers.engine.forward_sizes import ForwardSizes
from workers.engine.step_scheduler import ForwardKey, StepScheduler
from workers.models.pins import Pins
from workers.render.device import use_threads
from workers.render.failures import as_failure, caused, first_line, shown
from workers.render.request import URGENT, HandedBack, Progress, Rendered, RenderRequest, Snapshot
from workers.sampling import tables

log = logging.getLogger(__name__)

_REBUILDS = 3
"""How often in a row the loop may break before its worker is given up."""
_HANDING_BACK = 0.25
"""The part of a drain's time that is kept for writing down what is handed back."""


class Engine:
    """One thread that owns the models and renders many requests at once.

    Requests join and leave between two steps; each forward carries every running request of one `ForwardKey`, each at
    its own timestep (continuous batching, Orca, OSDI 2022). Texts are encoded before a request stands in line and
    pictures decoded after its last step, both beside the loop. All methods may be called from any thread.

    `slots` bounds how many requests run at once; how many rows share a forward is measured by `sizes`, or unbounded
    without it. A `deterministic` engine renders every request as if its spec asked for that. The loop's operators use
    `threads` cores, all that torch would take if left out; let no other thread use more than one (`use_threads`).
    """

    def __init__(
        self,
        pins: Pins,
        slots: int = 16,
        line: int = 64,
        *,
        sizes: ForwardSizes | None = None,
        deterministic: bool = False,
        threads: int | None = None,
    ) -> None:
        self._pins = pins
        self._slots, self._line = slots, line
        self._sizes = sizes or ForwardSizes(measured=False)
        self._deterministic = deterministic
        self._scheduler = self._new_scheduler()
        self._renders: dict[str, Render] = {}
        self._leaving: list[tuple[Render, Ending]] = []  # may be in the forward under way, and end after it
        # Guards everything above and below; the loop never holds it while a model runs. Whoever takes a render
        # out of `_renders` resolves its future, and nobody else does.
        self._changed = threading.Condition()
        self._accepting = False
        self._stopping = False
        self.failed: BaseException | None = None
        """What broke the loop for good, if anything did; its worker should be replaced."""
        self._broke_in_a_row = 0
        self._step_began: float | None = None
        self._threads = threads or torch.get_num_threads()
        self._encoder = Encoder(self._break)
        self._decoder = Decoder(self._decoded, self._break)
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Start the loop, once; requests are taken from now on."""
        with self._changed:
            self._accepting = True
        self._thread.start()

    @property
    def slots(self) -> int:
        """How many requests run at once at most: no more than the largest forward measured so far has rows."""
        return min(self._slots, self._sizes.largest or self._slots)

    @property
    def busy_seconds(self) -> float:
        """How long the step under way has taken so far, or beside the CPU the encoding or decoding; 0 when idle.

        What never ends is a hung device.
        """
        began = self._step_began
        step = 0.0 if began is None else time.monotonic() - began
        return max(step, self._encoder.side.busy_seconds, self._decoder.side.busy_seconds)

    def submit(self, request: RenderRequest) -> Future[Rendered]:
        """Put a request in line; its future ends with the picture or with a `FarmError`.

        Loads the model if need be, encodes the texts, and blocks while the line is full; an urgent request does not
        wait for that. Of two requests with one id that of the later attempt stays, or else this one; the other ends
        with `RenderCancelled`. The future's own `cancel` does nothing; use the engine's.

        Raises `ModelError` for a model that can't be had, `BadRequest` for what it can't draw, `RenderHandedBack` when
        the engine drains or has not started, and `EngineFailed` when its loop broke.
        """
        self._check_accepting()
        model = request.spec.model
        pipeline = self._pins.use(model)
        try:
            request.deterministic = request.spec.deterministic or self._deterministic
            shape = self._encoder.prepare(pipeline, request)
            key = ForwardKey(model, shape, str(pipeline.dtype), request.deterministic)
            render = Render(request, pipeline, key)
            render.future.set_running_or_notify_cancel()
            with self._changed:
                urgent = request.priority >= URGENT
                self._changed.wait_for(lambda: urgent or not (self._accepting and self._scheduler.full))
                self._check_accepting()
                if other := self._renders.get(request.id):
                    too_late = RenderCancelled(f"{request.id}: a newer attempt took its place")
                    if other.request.attempt > request.attempt:
                        raise too_late
                    self._end(other, too_late)
                self._scheduler.enqueue(request.id, key, request.rows, request.priority)
                self._renders[request.id] = render
                self._changed.notify_all()
        except BaseException:
            self._pins.release(model)
            raise
        return render.future

    def cancel(self, request_id: str) -> bool:
        """End a request with `RenderCancelled`, when the device works on it no longer; False if unknown.

        It is in no forward that begins later, and its future ends after the one under way.
        """
        return self._leave(request_id, lambda _: RenderCancelled(f"{request_id} was cancelled"))

    def hand_back(self, request_id: str, why: str) -> bool:
        """End a request in the same way, but with `HandedBack`, which carries its state; False if unknown.

        Whoever is denoised already gets its picture.
        """
        with self._changed:
            render = self._renders.get(request_id)
            if render is not None and render.request.denoised:
                return True
            return self._leave(request_id, lambda snapshot: HandedBack(f"{request_id}: {why}", snapshot))

    def snapshot(self, request_id: str, steps_done: int = 0) -> Future[Snapshot]:
        """A request's state after its next step, or after its first with that many steps done.

        The future is cancelled if the request ends before. Costs the loop next to nothing.
        """
        future: Future[Snapshot] = Future()
        with self._changed:
            render = self._renders.get(request_id)
            if render is None:
                cancel(future)
            else:
                render.snapshots.append((steps_done, future))
        return future

    def picture(self, snapshot: Snapshot, *, vae: bool = False) -> Image.Image:
        """What the latents of a snapshot show: roughly and small, or by the VAE. Beside the loop."""
        with self._pins.using(snapshot.spec.model) as pipeline:
            return self._decoder.picture(pipeline, snapshot, vae=vae)

    def progress(self) -> dict[str, Progress]:
        """How far every request here is, waiting or running, by id. Never waits for a step."""
        now = time.monotonic()
        with self._changed:
            return {request_id: render.request.progress(now) for request_id, render in self._renders.items()}

    def drain(self, seconds: float) -> None:
        """Take no more requests, and end those here within that time; returns when none is left.

        What can finish in that time, at its measured pace, does. All others end with `HandedBack`, which carries
        their state, so that another worker can start them or go on with them: those in line at once, those that run
        after their next step.
        """
        now = time.monotonic()
        deadline, finish_by = now + seconds, now + seconds * (1 - _HANDING_BACK)
        with self._changed:
            self._accepting = False
            self._changed.notify_all()
            renders, waiting = list(self._renders.values()), self._scheduler.waiting
        for render in renders:
            request = render.request
            if request.id in waiting or now + (request.seconds_left or 0) > finish_by:
                self.hand_back(request.id, "its worker drains")
        for until in (finish_by, deadline):
            wait([render.future for render in renders], timeout=max(0.0, until - time.monotonic()))
            for render in renders:
                self.hand_back(render.request.id, "not done in time, and its worker drains")
        for render in renders:  # a forward hangs, or a decoder
            self._end(render, HandedBack(f"{render.request.id}: its worker drains", None))

    def stop(self, timeout: float = 10.0) -> None:
        """Hand back whatever is here and end the loop, waiting `timeout` seconds at most for the step under way."""
        self.drain(0)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._encoder.side.close()
        self._decoder.side.close()

    def _check_accepting(self) -> None:
        if self.failed is not None:
            raise EngineFailed(f"the render loop broke: {self.failed!r}") from self.failed
        if not self._accepting:
            raise RenderHandedBack("the engine takes no more requests")

    def _leave(self, request_id: str, ending: Ending) -> bool:
        """Take a request out of the line, and end it when it is in no forward, and not being decoded."""
        with self._changed:
            render = self._renders.get(request_id)
            if render is None:
                return False
            if request_id in self._scheduler.running:
                self._scheduler.leave(request_id)
                self._leaving.append((render, ending))
                self._changed.notify_all()
            elif render.request.denoised and not self._decoder.drop(render.request):
                render.unwanted = ending(None)  # the device is not done with it before
            elif all(render is not other for other, _ in self._leaving):
                self._end(render, ending(render.state))
        return True

    def _loop(self) -> None:
        use_threads(self._threads)  # those beside the loop take one each, and new threads would too
        while not self._stopping and self.failed is None:
            try:
                with torch.inference_mode():
                    while self._work_to_do():
                        self._step_began = time.monotonic()
                        for renders in self._schedule():
                            self._advance(renders)
                        self._step_began = None
                        self._broke_in_a_row = 0
            except Exception as error:  # noqa: BLE001 - whatever it is, nobody may wait for ever
                self._break(error)

    def _break(self, error: Exception) -> None:
        """Fail whatever is here as retryable, and start anew; for good if the device is lost or it helps nothing."""
        log.error("the render loop broke: %r", error, exc_info=error)
        with self._changed:
            self._step_began = None
            self._broke_in_a_row += 1
            if isinstance(error, torch.AcceleratorError) or self._broke_in_a_row > _REBUILDS:
                self.failed, self._accepting = error, False
            renders = list(self._renders.values())
            for render in renders:
                self._end(render, caused(EngineFailed(f"the render loop broke: {error!r}"), error))
            self._scheduler = self._new_scheduler()
            self._changed.notify_all()

    def _new_scheduler(self) -> StepScheduler:
        return StepScheduler(self._slots, self._line, urgent=URGENT, most_rows=self._sizes.limit)

    def _work_to_do(self) -> bool:
        """Let go of who leaves, and wait for a request; False when the engine stops."""
        with self._changed:
            while True:
                for render, ending in self._leaving:
                    if not render.request.denoised:  # else that was its last step, and its picture is on the way
                        self._end(render, ending(render.state))
                self._leaving.clear()
                if self._scheduler.running or self._scheduler.waiting or self._stopping or self.failed:
                    break
                self._changed.wait()
            return not self._stopping and self.failed is None

    def _schedule(self) -> list[list[Render]]:
        """Let the line take the free slots, and choose who shares the next forward, or more than one if it is full."""
        with self._changed:
            # Of those that run too: somebody may come, and be let in, while others are measured.
            here = [self._renders[each] for each in (*self._scheduler.running, *self._scheduler.waiting)]
        for render in here:
            if render.key not in self._sizes:
                self._step_began = None  # measuring may take longer than any step, and is no sign of a hung device
                self._sizes.measure(render.pipeline, render.key, render.request)
                self._step_began = time.monotonic()
        with self._changed:
            now = time.monotonic()
            for request_id in self._scheduler.admit():
                request = self._renders[request_id].request
                request.started, request.stepped = request.started or now, now
            self._changed.notify_all()  # the line has room again
            renders = [self._renders[request_id] for request_id in self._scheduler.next_forward()]
        parts = self._sizes.parts(renders[0].key, [render.request.rows for render in renders]) if renders else []
        return [renders[part] for part in parts]

    def _advance(self, renders: list[Render]) -> None:
        """One forward for all of them, and a step."""
        pipeline, requests = renders[0].pipeline, [render.request for render in renders]
        began, rows = time.monotonic(), sum(request.rows for request in requests)
        filled = self._sizes.filled(pipeline, renders[0].key, requests)
        try:
            outputs = pipeline.denoise(requests, filled)
        except torch.AcceleratorError:  # the device is lost for everybody
            raise
        except Exception as error:  # noqa: BLE001 - a neighbour must not suffer from it
            self._divide(renders, max(filled or 0, rows), error)
        else:
            for request in requests:  # on a GPU right on the average of many forwards
                request.device_seconds += (time.monotonic() - began) * request.rows / rows
            self._postprocess(renders, outputs)

    def _divide(self, renders: list[Render], rows: int, error: Exception) -> None:
        """After a forward that raised: try again in halves, until the one is alone for which it does."""
        traceback.clear_frames(error.__traceback__)  # they hold tensors, which are in the way if there was no room
        key, request = renders[0].key, renders[0].request
        if isinstance(error, torch.OutOfMemoryError):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._sizes.too_large(renders[0].pipeline, key, rows)
        log.warning("a forward of %d rows failed at step %d: %s", rows, request.steps_done + 1, first_line(error))
        if half := len(renders) // 2:
            self._advance(renders[:half])
            self._advance(renders[half:])
        elif isinstance(error, torch.OutOfMemoryError):
            what = f"one request alone ({rows} rows of {shown(key.shape)} latents, {key.dtype})"
            where = f"does not fit beside what is pinned, at step {request.steps_done + 1}"
            self._end(renders[0], OutOfMemory(f"{what} {where}: {first_line(error)}"))
        else:
            log.error("a forward of %s alone failed", request.id, exc_info=error)
            self._end(renders[0], caused(EngineFailed(f"the forward failed: {error!r}"), error))

    def _postprocess(self, renders: list[Render], outputs: torch.Tensor) -> None:
        """Step each request with its output, and let go of those that are at their end."""
        together = [place for place, render in enumerate(renders) if render.request.scheduler is None]
        alone = [[place] for place, render in enumerate(renders) if render.request.scheduler is not None]
        for places in filter(None, (together, *alone)):
            own = outputs if len(places) == len(renders) else outputs[places]
            self._move([renders[place] for place in places], own)

    def _move(self, renders: list[Render], outputs: torch.Tensor) -> None:
        """A step of these samplers; if it raises for several at once, one by one."""
        try:
            latents = renders[0].pipeline.step([render.request for render in renders], outputs)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001 - a neighbour must not suffer from it
            if len(renders) == 1:
                doing = f"step {shown(renders[0].key.shape)} latents at step {renders[0].request.steps_done + 1}"
                self._end(renders[0], as_failure(error, doing))
            else:
                for place, render in enumerate(renders):
                    self._move([render], outputs[place : place + 1])
            return
        finite, now = latents.isfinite().flatten(1).all(1), time.monotonic()
        # Asking a GPU for a number waits for it: there a request's first bad step is noted, and read at its end.
        flags = finite.tolist() if latents.is_cpu else [True] * len(renders)
        for place, render in enumerate(renders):
            request = render.request
            request.stepped_at(now)
            if not flags[place]:
                self._end(render, BadImage(f"NaN or infinity in the latents after step {request.steps_done}"))
                continue
            if not latents.is_cpu:
                request.note_finite(finite[place])
            self._observe(render)

    def _observe(self, render: Render) -> None:
        """After a step: keep the frame, take the snapshots that are due, and pass a denoised request to the decoder."""
        request = render.request
        if request.spec.trajectory and request.steps_done > len(request.frames):
            request.frames.append(tables.visible(request))
        if render.snapshots and not request.denoised:
            with self._changed:
                due = [each for each in render.snapshots if request.steps_done >= each[0]]
                render.snapshots = [each for each in render.snapshots if each not in due]
            for _, future in due:
                if future.set_running_or_notify_cancel():
                    future.set_result(request.snapshot(render.pipeline.sha256))
        if request.denoised:
            with self._changed:
                if self._renders.get(request.id) is not render:
                    return  # it ended meanwhile, and the id may be a newer attempt's
                self._scheduler.leave(request.id)
                idle = not self._scheduler.running and not self._scheduler.waiting
            self._decoder.add(render.pipeline, request, idle=idle)

    def _decoded(self, request: RenderRequest, outcome: Rendered | FarmError) -> None:
        with self._changed:
            render = self._renders.get(request.id)
            if render is not None and render.request is request:
                self._end(render, render.unwanted or outcome)

    def _end(self, render: Render, outcome: Rendered | FarmError) -> bool:
        """Take a request out and resolve its future; False, and nothing done, if somebody has before."""
        with self._changed:
            if self._renders.get(render.request.id) is not render:
                return False
            del self._renders[render.request.id]
            self._scheduler.leave(render.request.id)
            wanted, render.snapshots = render.snapshots, []
            self._changed.notify_all()
        self._pins.release(render.key.model)
        for _, future in wanted:
            cancel(future)
        if isinstance(outcome, Rendered):
            render.future.set_result(outcome)
        else:
            render.future.set_exception(outcome)
        return True

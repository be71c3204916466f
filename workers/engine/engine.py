"""The render loop of a worker: schedule, forward, step, finish."""

import logging
import threading
import time
import traceback
from concurrent.futures import Future, wait

import torch
from PIL import Image

from farm.errors import BadImage, EngineFailed, FarmError, OutOfMemory, RenderCancelled, RenderHandedBack
from workers.engine.active_render import ActiveRender, Ending, cancel
from workers.engine.decoder import Decoder
from workers.engine.encoder import Encoder
from workers.engine.forward_sizes import ForwardSizes
from workers.engine.step_scheduler import ForwardKey, StepScheduler
from workers.models.pins import Pins
from workers.render.device import use_threads
from workers.render.failures import as_failure, caused, first_line, shape_text
from workers.render.request import URGENT, Progress, Rendered, RenderRequest, RequestHandedBack, Snapshot
from workers.sampling import tables

log = logging.getLogger(__name__)

_REBUILDS = 3
"""Failures of the loop in a row after which the engine gives up."""
_HAND_BACK_SHARE = 0.25
"""The share of a drain's time that is reserved for storing the state of requests that are handed back."""


class Engine:
    """One thread that owns the models and renders many requests at once.

    Requests join and leave between steps; each forward has all running requests of one `ForwardKey`, each at its own
    timestep (continuous batching, Orca, OSDI 2022). Texts are encoded before a request is queued and pictures decoded
    after its last step, both in threads of their own. All methods may be called from any thread.

    `slots` is the most requests that run at once. `sizes` measures the best number of rows per forward; without it the
    number is unlimited. A `deterministic` engine renders every request as if its spec asked for that. The loop's
    operators use `threads` cores, by default torch's number; no other thread may use more than one (`use_threads`).
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
        self._renders: dict[str, ActiveRender] = {}
        self._leaving: list[tuple[ActiveRender, Ending]] = []  # to be ended after the current forward
        # Guards all attributes; the loop never holds it while a model runs. Only the thread that removes a render from
        # `_renders` resolves its future.
        self._changed = threading.Condition()
        self._accepting = False
        self._stopping = False
        self.failed: BaseException | None = None
        """The error that stopped the loop for good, if any: the worker has to be replaced."""
        self._broke_in_a_row = 0
        self._step_began: float | None = None
        self._threads = threads or torch.get_num_threads()
        self._encoder = Encoder(self._break)
        self._decoder = Decoder(self._decoded, self._break)
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Start the loop, once, and accept requests."""
        with self._changed:
            self._accepting = True
        self._thread.start()

    @property
    def slots(self) -> int:
        """The most requests that run at once, limited by the rows of the largest measured forward."""
        return min(self._slots, self._sizes.largest or self._slots)

    @property
    def busy_seconds(self) -> float:
        """The age of the current step, encoding or decoding, whichever is longest; 0 when idle.

        It grows without limit if the device hangs.
        """
        began = self._step_began
        step = 0.0 if began is None else time.monotonic() - began
        return max(step, self._encoder.side.busy_seconds, self._decoder.side.busy_seconds)

    def submit(self, request: RenderRequest) -> Future[Rendered]:
        """Queue a request; its future ends with the picture or with a `FarmError`.

        Loads the model if necessary, encodes the texts, and blocks while the queue is full, except for an urgent
        request. Of two requests with the same id the later attempt stays, or this request if they are equal; the other
        ends with `RenderCancelled`. The future's own `cancel` has no effect; use the engine's.

        Raises `ModelError` for a model that can't be loaded, `BadRequest` for a spec that it can't render,
        `RenderHandedBack` while the engine drains or has not started, and `EngineFailed` after its loop has failed.
        """
        self._check_accepting()
        model = request.spec.model
        pipeline = self._pins.use(model)
        try:
            request.deterministic = request.spec.deterministic or self._deterministic
            shape = self._encoder.prepare(pipeline, request)
            key = ForwardKey(model, shape, str(pipeline.dtype), request.deterministic, request.text_tokens)
            render = ActiveRender(request, pipeline, key)
            render.future.set_running_or_notify_cancel()
            with self._changed:
                urgent = request.priority >= URGENT
                self._changed.wait_for(lambda: urgent or not (self._accepting and self._scheduler.full))
                self._check_accepting()
                if other := self._renders.get(request.id):
                    replaced = RenderCancelled(f"{request.id}: a newer attempt took its place")
                    if other.request.attempt > request.attempt:
                        raise replaced
                    self._end(other, replaced)
                self._scheduler.enqueue(request.id, key, request.rows, request.priority)
                self._renders[request.id] = render
                self._changed.notify_all()
        except BaseException:
            self._pins.release(model)
            raise
        return render.future

    def cancel(self, request_id: str) -> bool:
        """End a request with `RenderCancelled`; False if its id is unknown.

        It joins no further forward, and its future ends once the device no longer works on it.
        """
        return self._withdraw(request_id, lambda _: RenderCancelled(f"{request_id} was cancelled"))

    def hand_back(self, request_id: str, why: str) -> bool:
        """End a request with `RequestHandedBack`, which carries its state; False if its id is unknown.

        A request that is already denoised ends with its picture instead.
        """
        with self._changed:
            render = self._renders.get(request_id)
            if render is not None and render.request.denoised:
                return True
            return self._withdraw(request_id, lambda snapshot: RequestHandedBack(f"{request_id}: {why}", snapshot))

    def snapshot(self, request_id: str, steps_done: int = 0) -> Future[Snapshot]:
        """A request's state after its next step with at least that many steps done.

        The future is cancelled if the request ends before. The cost to the loop is negligible.
        """
        future: Future[Snapshot] = Future()
        with self._changed:
            render = self._renders.get(request_id)
            if render is None:
                cancel(future)
            else:
                render.snapshots.append((steps_done, future))
        return future

    def preview(self, snapshot: Snapshot, *, vae: bool = False) -> Image.Image:
        """The picture of a snapshot's latents, small and rough, or decoded by the VAE; outside the loop."""
        with self._pins.using(snapshot.spec.model) as pipeline:
            return self._decoder.preview(pipeline, snapshot, vae=vae)

    def progress(self) -> dict[str, Progress]:
        """The progress of every request, waiting or running, by id; never waits for a step."""
        now = time.monotonic()
        with self._changed:
            return {request_id: render.request.progress(now) for request_id, render in self._renders.items()}

    def drain(self, seconds: float) -> None:
        """Accept no more requests, and end those in the engine within that time; returns when it is empty.

        Requests that can finish in time at their measured pace do. All others end with `RequestHandedBack`, which
        carries their state, so that another worker can resume them: waiting ones at once, running ones after their
        next step.
        """
        now = time.monotonic()
        deadline, finish_by = now + seconds, now + seconds * (1 - _HAND_BACK_SHARE)
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
        for render in renders:  # the device hangs in a forward or a decoding
            self._end(render, RequestHandedBack(f"{render.request.id}: its worker drains", None))

    def stop(self, timeout: float = 10.0) -> None:
        """Hand back all requests and end the loop, waiting at most `timeout` seconds for the current step."""
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

    def _withdraw(self, request_id: str, ending: Ending) -> bool:
        """Keep a request out of further forwards, and end it once it is neither in a forward nor being decoded."""
        with self._changed:
            render = self._renders.get(request_id)
            if render is None:
                return False
            if request_id in self._scheduler.running:
                self._scheduler.remove(request_id)
                self._leaving.append((render, ending))
                self._changed.notify_all()
            elif render.request.denoised and not self._decoder.discard(render.request):
                render.cancelled_with = ending(None)  # its future ends when the device is done with it
            elif all(render is not other for other, _ in self._leaving):
                self._end(render, ending(render.state))
        return True

    def _loop(self) -> None:
        use_threads(self._threads)  # per thread: the encoder and the decoder take one core each
        while not self._stopping and self.failed is None:
            try:
                with torch.inference_mode():
                    while self._wait_for_work():
                        self._step_began = time.monotonic()
                        for renders in self._schedule():
                            self._advance(renders)
                        self._step_began = None
                        self._broke_in_a_row = 0
            except Exception as error:  # noqa: BLE001 - no future may stay unresolved
                self._break(error)

    def _break(self, error: Exception) -> None:
        """Fail all requests as retryable and reset the loop; for good if the device is lost or resets do not help."""
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

    def _wait_for_work(self) -> bool:
        """End withdrawn requests, and wait until there is one to render; False when the engine stops."""
        with self._changed:
            while True:
                for render, ending in self._leaving:
                    if not render.request.denoised:  # else it is being decoded
                        self._end(render, ending(render.state))
                self._leaving.clear()
                if self._scheduler.running or self._scheduler.waiting or self._stopping or self.failed:
                    break
                self._changed.wait()
            return not self._stopping and self.failed is None

    def _schedule(self) -> list[list[ActiveRender]]:
        """Give free slots to waiting requests, and choose the next forward, split by its row limit."""
        with self._changed:
            # Running requests too: while others are measured, new ones may arrive and be admitted.
            active = [self._renders[each] for each in (*self._scheduler.running, *self._scheduler.waiting)]
        for render in active:
            if render.key not in self._sizes:
                self._step_began = None  # measuring takes longer than a step: it must not look like a hung device
                self._sizes.measure(render.pipeline, render.key, render.request)
                self._step_began = time.monotonic()
        with self._changed:
            now = time.monotonic()
            for request_id in self._scheduler.admit():
                request = self._renders[request_id].request
                request.started, request.stepped = request.started or now, now
            self._changed.notify_all()  # the queue is no longer full
            renders = [self._renders[request_id] for request_id in self._scheduler.next_forward()]
        parts = self._sizes.split(renders[0].key, [render.request.rows for render in renders]) if renders else []
        return [renders[part] for part in parts]

    def _advance(self, renders: list[ActiveRender]) -> None:
        """Run a forward of these requests, and step each with its output."""
        pipeline, requests = renders[0].pipeline, [render.request for render in renders]
        began, rows = time.monotonic(), sum(request.rows for request in requests)
        padded = self._sizes.padded_rows(pipeline, renders[0].key, requests)
        try:
            outputs = pipeline.denoise(requests, padded)
        except torch.AcceleratorError:  # the device is lost
            raise
        except Exception as error:  # noqa: BLE001 - only the requests that cause it may fail
            self._retry_in_halves(renders, max(padded or 0, rows), error)
        else:
            for request in requests:  # asynchronous on a GPU: right only on the average of many forwards
                request.device_seconds += (time.monotonic() - began) * request.rows / rows
            self._postprocess(renders, outputs)

    def _retry_in_halves(self, renders: list[ActiveRender], rows: int, error: Exception) -> None:
        """Repeat a failed forward in halves until the failing request is alone, and end that request."""
        traceback.clear_frames(error.__traceback__)  # frees their tensors, which matters after an OutOfMemoryError
        key, request = renders[0].key, renders[0].request
        if isinstance(error, torch.OutOfMemoryError):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._sizes.shrink(renders[0].pipeline, key, rows)
        log.warning("a forward of %d rows failed at step %d: %s", rows, request.steps_done + 1, first_line(error))
        if half := len(renders) // 2:
            self._advance(renders[:half])
            self._advance(renders[half:])
        elif isinstance(error, torch.OutOfMemoryError):
            what = f"one request alone ({rows} rows of {shape_text(key.shape)} latents, {key.dtype})"
            where = f"does not fit beside what is pinned, at step {request.steps_done + 1}"
            self._end(renders[0], OutOfMemory(f"{what} {where}: {first_line(error)}"))
        else:
            log.error("a forward of %s alone failed", request.id, exc_info=error)
            self._end(renders[0], caused(EngineFailed(f"the forward failed: {error!r}"), error))

    def _postprocess(self, renders: list[ActiveRender], outputs: torch.Tensor) -> None:
        """Step each request with its output: those with tables in one call, those with scheduler objects one by one."""
        together = [place for place, render in enumerate(renders) if render.request.scheduler is None]
        alone = [[place] for place, render in enumerate(renders) if render.request.scheduler is not None]
        for places in filter(None, (together, *alone)):
            own = outputs if len(places) == len(renders) else outputs[places]
            self._step([renders[place] for place in places], own)

    def _step(self, renders: list[ActiveRender], outputs: torch.Tensor) -> None:
        """Step these requests together, or one by one if that raises; pass on the denoised ones."""
        try:
            latents = renders[0].pipeline.step([render.request for render in renders], outputs)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001 - only the requests that cause it may fail
            if len(renders) == 1:
                doing = f"step {shape_text(renders[0].key.shape)} latents at step {renders[0].request.steps_done + 1}"
                self._end(renders[0], as_failure(error, doing))
            else:
                for place, render in enumerate(renders):
                    self._step([render], outputs[place : place + 1])
            return
        finite, now = latents.isfinite().flatten(1).all(1), time.monotonic()
        # Reading a number from a GPU blocks: on a GPU the first bad step stays on the device until the end.
        flags = finite.tolist() if latents.is_cpu else [True] * len(renders)
        for place, render in enumerate(renders):
            request = render.request
            request.stepped_at(now)
            if not flags[place]:
                self._end(render, BadImage(f"NaN or infinity in the latents after step {request.steps_done}"))
                continue
            if not latents.is_cpu:
                request.note_finite(finite[place])
            self._after_step(render)

    def _after_step(self, render: ActiveRender) -> None:
        """Keep the frame, resolve pending snapshots, and pass the request to the decoder if it is denoised."""
        request = render.request
        if request.spec.trajectory and request.steps_done > len(request.frames):
            request.frames.append(tables.visible(request))
        if render.snapshots and not request.denoised:
            with self._changed:
                due = [pending for pending in render.snapshots if request.steps_done >= pending[0]]
                render.snapshots = [pending for pending in render.snapshots if pending not in due]
            for _, future in due:
                if future.set_running_or_notify_cancel():
                    future.set_result(request.snapshot(render.pipeline.sha256))
        if request.denoised:
            with self._changed:
                if self._renders.get(request.id) is not render:
                    return  # the request has ended; the id may belong to a newer attempt
                self._scheduler.remove(request.id)
                idle = not self._scheduler.running and not self._scheduler.waiting
            self._decoder.add(render.pipeline, request, idle=idle)

    def _decoded(self, request: RenderRequest, outcome: Rendered | FarmError) -> None:
        with self._changed:
            render = self._renders.get(request.id)
            if render is not None and render.request is request:
                self._end(render, render.cancelled_with or outcome)

    def _end(self, render: ActiveRender, outcome: Rendered | FarmError) -> bool:
        """Remove a request and resolve its future; False if it was resolved before."""
        with self._changed:
            if self._renders.get(render.request.id) is not render:
                return False
            del self._renders[render.request.id]
            self._scheduler.remove(render.request.id)
            pending, render.snapshots = render.snapshots, []
            self._changed.notify_all()
        self._pins.release(render.key.model)
        for _, future in pending:
            cancel(future)
        if isinstance(outcome, Rendered):
            render.future.set_result(outcome)
        else:
            render.future.set_exception(outcome)
        return True

"""Drives the farm's engine, and observes its forwards from outside."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.apart import Checkpoints, Peak, Run
from benchmarks.ceiling import FullForward
from farm.errors import BadImage, FarmError
from farm.objects.storage import Storage
from farm.settings import Settings
from farm.specs.object_keys import checkpoint_key
from farm.specs.spec import RenderSpec
from workers.engine.engine import Engine
from workers.engine.forward_sizes import ForwardSizes
from workers.engine.warming import warm
from workers.models.pins import Pins
from workers.outputs import checkpoint
from workers.pipelines import load
from workers.render.device import keep_freed_memory, use_threads
from workers.render.request import Rendered, RenderRequest, Snapshot

_MODEL = RenderSpec.model_fields["model"].default
_LINE = 4096
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - so it is called
"""torch's attention on a CPU; its FLOP counter knows only the GPU kernels."""


@dataclass(frozen=True)
class Forward:
    """One forward: its start, its requests, and its time on the device."""

    began: float
    ids: tuple[str, ...]
    seconds: Callable[[], float]


class Watched:
    """A pipeline that records encodings and forwards; all else is delegated."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.forwards: list[Forward] = []
        self.encoded: dict[str, float] = {}
        self.fullest: Sequence[RenderRequest] = ()
        """Of the forward with the most requests, the last one of them."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def forget(self) -> None:
        self.forwards.clear()
        self.fullest = ()

    def encode(self, request: RenderRequest) -> None:
        self._pipeline.encode(request)
        self.encoded[request.id] = time.monotonic()

    def denoise(self, requests: Sequence[RenderRequest], rows: int | None = None) -> torch.Tensor:
        began, cuda = time.monotonic(), self._pipeline.device.type == "cuda"
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []  # type: ignore[no-untyped-call]
        if cuda:
            events[0].record()
        outputs: torch.Tensor = self._pipeline.denoise(requests, rows)
        if cuda:
            events[1].record()
        took = time.monotonic() - began
        if len(requests) >= len(self.fullest):
            self.fullest = requests
        seconds = (lambda: events[0].elapsed_time(events[1]) / 1000) if cuda else (lambda: took)
        self.forwards.append(Forward(began, tuple(request.id for request in requests), seconds))
        return outputs


def _attention_flop(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


class Farm:
    """An engine with one model, started and warm."""

    def __init__(self, folder: Path, device: str, dtype: str, threads: int, slots: int, sizes: Path) -> None:
        use_threads(1)  # the other cores are for the loop, as in a worker
        keep_freed_memory()
        self._device = device
        self._watched = Watched(load(str(folder), torch.device(device), getattr(torch, dtype)))
        pins = Pins.of({_MODEL: self._watched})
        self._engine = Engine(pins, slots, _LINE, sizes=ForwardSizes(sizes), threads=threads)
        self._engine.start()
        warm(self._engine, pins)
        self._names = 0

    def picture(self, spec: RenderSpec) -> np.ndarray:
        """One picture, (height, width, 3) of 8 bits."""
        return np.asarray(self._submit(spec).result().image)

    def warm(self, specs: Sequence[RenderSpec]) -> None:
        """Measure the forwards of these specs' kinds."""
        for spec in specs:
            with suppress(BadImage):
                self._submit(spec.model_copy(update={"num_inference_steps": 2})).result()

    def render(self, specs: Sequence[RenderSpec], at_once: int | None = None, arrivals: Sequence[float] = ()) -> Run:
        """Submit all as soon as there is room, `at_once` at a time, or each at its arrival."""
        peak, began = Peak(self._device), time.monotonic()
        room = threading.Semaphore(at_once or len(specs))
        ended: list[float] = [0.0] * len(specs)
        futures = []
        for place, spec in enumerate(specs):
            came = began + arrivals[place] if arrivals else None
            room.acquire()
            if came is not None:
                time.sleep(max(0.0, came - time.monotonic()))
            came = came or time.monotonic()

            def end(_: Future[Rendered], place: int = place, came: float = came) -> None:
                ended[place] = time.monotonic() - came
                room.release()

            futures.append(self._submit(spec))
            futures[-1].add_done_callback(end)
        for future in futures:
            future.result()
        return Run(len(specs), time.monotonic() - began, peak.bytes, tuple(ended))

    def busy(self, specs: Sequence[RenderSpec]) -> tuple[float, float, int, Run]:
        """Denoiser seconds, wall seconds and requests per forward while all slots are full and requests wait."""
        self._watched.forget()
        run = self.render(specs)
        forwards = list(self._watched.forwards)
        most = max(len(forward.ids) for forward in forwards)
        full = [place for place, forward in enumerate(forwards) if len(forward.ids) == most]
        if len(full) < 2:
            raise ValueError("the slots were never full: more specs are needed")
        window = forwards[full[0] : full[-1]]
        wall = forwards[full[-1]].began - window[0].began
        return sum(forward.seconds() for forward in window), wall, most, run

    def full_forward(self, specs: Sequence[RenderSpec]) -> FullForward:
        """The largest forward of these specs on a CPU: its FLOP and its time."""
        self._watched.forget()
        self.render(specs)
        requests = [copy(request) for request in self._watched.fullest]
        for request in requests:
            request.step_index = 0  # they have ended
        # Not in the loop: the counter hooks into every module that runs, and others run beside the loop.
        with torch.inference_mode():
            self._watched.denoise(requests)  # computes the keys and values that later forwards reuse
            with FlopCounterMode(display=False, custom_mapping={_FUSED: _attention_flop}) as counter:
                self._watched.denoise(requests)
        # The last two are those of this thread.
        took = [forward.seconds() for forward in self._watched.forwards[:-2] if len(forward.ids) == len(requests)]
        rows = sum(request.rows for request in requests)
        return FullForward(len(requests), rows, counter.get_total_flops(), median(took))

    def urgent(
        self, bulk: Sequence[RenderSpec], urgent: Sequence[RenderSpec]
    ) -> tuple[list[tuple[int, float, float]], int]:
        """The wait of each urgent request while bulk work runs, and the peak memory.

        A wait is (forwards begun before its first, seconds, seconds with its encoding), counted from the end of its
        encoding.
        """
        peak, chosen, waits = Peak(self._device), random.Random(0), []
        with self._background(bulk):
            for spec in urgent:
                time.sleep(chosen.random() / 10)  # at a random point of a step
                asked = time.monotonic()
                future, name = self._submit(spec, priority=100), self._name()
                with suppress(BadImage):
                    future.result()
                entered = self._watched.encoded[name]
                after = [forward for forward in list(self._watched.forwards) if forward.began >= entered]
                before = next(place for place, forward in enumerate(after) if name in forward.ids)
                waits.append((before, after[before].began - entered, after[before].began - asked))
            peak_bytes = peak.bytes
        return waits, peak_bytes

    def checkpointed(self, specs: Sequence[RenderSpec], every: float, settings: Settings) -> tuple[Run, Checkpoints]:
        """Render while every running request is checkpointed, `every` seconds after the last time.

        Uses as many threads as a worker. Each object is deleted at once: a worker replaces it under the same key and
        deletes it when the job ends, so one deletion per checkpoint is the most.
        """
        over, took, sizes = threading.Event(), list[float](), list[int]()

        def write(name: str, future: Future[Snapshot]) -> None:
            began, key = time.thread_time(), checkpoint_key(name, 1, 1)
            data = checkpoint.pack(future.result())
            storage.put(key, data)
            storage.delete_many([key])
            took.append(time.thread_time() - began)
            sizes.append(len(data))

        def beat() -> int:
            rounds = 0
            while not over.wait(every):
                running = [name for name, progress in self._engine.progress().items() if progress.seconds is not None]
                snapshots = {name: self._engine.snapshot(name) for name in running}
                wait(snapshots.values())
                writing = [pool.submit(write, name, look) for name, look in snapshots.items() if not look.cancelled()]
                for future in writing:
                    future.result()
                rounds += bool(writing)
            return rounds

        with closing(Storage(settings)) as storage, ThreadPoolExecutor(2) as pool, ThreadPoolExecutor(1) as heart:
            storage.ping()  # boto3 takes a third of a second to initialize
            beating = heart.submit(beat)
            try:
                run = self.render(specs)
            finally:
                over.set()
            return run, Checkpoints(beating.result(), len(sizes), sum(sizes), sum(took))

    def stop(self) -> None:
        """Stop the engine."""
        self._engine.stop()

    @contextmanager
    def _background(self, bulk: Sequence[RenderSpec]) -> Iterator[None]:
        first = self._names + 1
        futures = [self._submit(spec) for spec in bulk]
        names = [f"bench-{number}" for number in range(first, self._names + 1)]
        while not any(progress.seconds_per_step for progress in self._engine.progress().values()):
            time.sleep(0.01)
        yield
        if any(future.done() for future in futures):
            raise ValueError("the bulk work ended too soon: it needs more steps")
        for name in names:
            self._engine.cancel(name)
        for future in futures:
            with suppress(FarmError):
                future.result()

    def _submit(self, spec: RenderSpec, priority: int = 50) -> Future[Rendered]:
        self._names += 1
        return self._engine.submit(RenderRequest(self._name(), spec, priority))

    def _name(self) -> str:
        return f"bench-{self._names}"

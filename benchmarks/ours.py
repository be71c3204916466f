"""The farm's engine as the benchmark drives it, and what can be seen of its forwards from outside."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.apart import Peak, Run
from farm.errors import BadImage, FarmError
from farm.spec import RenderSpec
from workers import state
from workers.device import keep_freed_memory, use_threads
from workers.engine import Engine
from workers.forward_sizes import ForwardSizes
from workers.pins import Pins
from workers.pipelines import load
from workers.request import Rendered, RenderRequest, Snapshot

_MODEL = RenderSpec.model_fields["model"].default
_LINE = 4096


@dataclass(frozen=True)
class Forward:
    """One forward: when it began, by whom, and how long the device took for it."""

    began: float
    ids: tuple[str, ...]
    seconds: Callable[[], float]


class Watched:
    """A pipeline that notes when texts were encoded and forwards began; all else is the pipeline's own."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.forwards: list[Forward] = []
        self.encoded: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

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
        seconds = (lambda: events[0].elapsed_time(events[1]) / 1000) if cuda else (lambda: took)
        self.forwards.append(Forward(began, tuple(request.id for request in requests), seconds))
        return outputs


class Farm:
    """An engine with one model, started and warm."""

    def __init__(self, folder: Path, device: str, dtype: str, threads: int, slots: int, sizes: Path) -> None:
        use_threads(1)  # the rest is for the loop, as in a worker
        keep_freed_memory()
        self._device = device
        self._watched = Watched(load(str(folder), torch.device(device), getattr(torch, dtype)))
        self._engine = Engine(
            Pins.of({_MODEL: self._watched}), slots, _LINE, sizes=ForwardSizes(sizes), threads=threads
        )
        self._engine.start()
        self._engine.warm()
        self._names = 0

    def picture(self, spec: RenderSpec) -> bytes:
        """One picture's RGB bytes."""
        return self._submit(spec).result().image.tobytes()

    def warm(self, specs: Sequence[RenderSpec]) -> None:
        """Measure the forwards of these specs' kinds."""
        for spec in specs:
            with suppress(BadImage):
                self._submit(spec.model_copy(update={"num_inference_steps": 2})).result()

    def render(self, specs: Sequence[RenderSpec], at_once: int | None = None, arrivals: Sequence[float] = ()) -> Run:
        """All as soon as there is room, so many `at_once`, or each when it arrives."""
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

    def busy(self, specs: Sequence[RenderSpec]) -> tuple[float, float, int]:
        """Denoiser seconds, wall seconds and requests a forward while the slots are full and somebody waits."""
        self._watched.forwards.clear()
        self.render(specs)
        forwards = list(self._watched.forwards)
        most = max(len(forward.ids) for forward in forwards)
        full = [place for place, forward in enumerate(forwards) if len(forward.ids) == most]
        if len(full) < 2:
            raise ValueError("the slots were never full: more specs are needed")
        window = forwards[full[0] : full[-1]]
        wall = forwards[full[-1]].began - window[0].began
        return sum(forward.seconds() for forward in window), wall, most

    def urgent(self, bulk: Sequence[RenderSpec], urgent: Sequence[RenderSpec]) -> list[tuple[int, float, float]]:
        """Each urgent one's wait while bulk work runs: (forwards begun before its first, seconds, with its encoding).

        Counted from the end of its encoding, which is just before it stands in line.
        """
        chosen, waits = random.Random(0), []
        with self._background(bulk):
            for spec in urgent:
                time.sleep(chosen.random() / 10)  # at any point of a step
                asked = time.monotonic()
                future, name = self._submit(spec, priority=100), self._name()
                with suppress(BadImage):
                    future.result()
                entered = self._watched.encoded[name]
                after = [forward for forward in list(self._watched.forwards) if forward.began >= entered]
                before = next(place for place, forward in enumerate(after) if name in forward.ids)
                waits.append((before, after[before].began - entered, after[before].began - asked))
        return waits

    def checkpointed(self, specs: Sequence[RenderSpec], every: float) -> tuple[Run, int, float]:
        """Render while every running request is looked at and packed so often; also the packs and their CPU time."""
        pool, over, took = ThreadPoolExecutor(2), threading.Event(), list[float]()

        def pack(snapshot: Snapshot) -> None:
            began = time.thread_time()
            state.pack(snapshot)
            took.append(time.thread_time() - began)

        def seen(look: Future[Snapshot]) -> None:
            if not look.cancelled():
                pool.submit(pack, look.result())

        def beat() -> None:
            while not over.wait(every):
                for name, progress in self._engine.progress().items():
                    if progress.seconds is not None:
                        self._engine.look(name).add_done_callback(seen)

        beating = threading.Thread(target=beat)
        beating.start()
        run = self.render(specs)
        over.set()
        beating.join()
        pool.shutdown()
        return run, len(took), sum(took)

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

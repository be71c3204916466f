"""A null pipeline whose every forward waits for the test, and helpers for tests of the engine."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from farm.specs.spec import RenderSpec
from workers.engine.engine import Engine
from workers.models.pins import Pins
from workers.pipelines.null import NullPipeline, colour
from workers.render.pipeline import Pipeline
from workers.render.request import RenderRequest

SOON = 30.0
"""Seconds after which a waiting test fails."""


class Gated:
    """A null pipeline that runs a forward when the test allows it, and that can be made to fail in any verb."""

    def __init__(self) -> None:
        self.null = NullPipeline()
        self.forwards: list[list[str]] = []
        self.filled: list[int | None] = []
        self.decoded: list[int] = []
        self.faults: dict[str, Callable[[Any], None]] = {}
        """Functions by `verb` or `verb id`, called with the verb's first argument before the verb runs."""
        self.poison: dict[str, int] = {}
        """By request id, the forward (counted from 0) whose output is NaN."""
        self.rows: dict[str, int] = {}
        self.most_rows = 2**31
        """A forward with more rows runs out of memory."""
        self._allowed = threading.Semaphore(0)
        self._begun = threading.Semaphore(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.null, name)

    def fault(self, verb: str, argument: Any) -> None:
        for request in argument if isinstance(argument, list) else []:
            self.faults.get(f"{verb} {request.id}", lambda _: None)(argument)
        self.faults.get(verb, lambda _: None)(argument)

    def plan(self, request: RenderRequest) -> tuple[int, ...]:
        shape = self.null.plan(request)
        request.rows = self.rows.get(request.id, 1)
        return shape

    def encode(self, request: RenderRequest) -> None:
        self.fault("encode", [request])
        self.null.encode(request)

    def denoise(self, requests: Sequence[RenderRequest], rows: int | None = None) -> torch.Tensor:
        self.forwards.append([request.id for request in requests])
        self.filled.append(rows)
        self._begun.release()
        assert self._allowed.acquire(timeout=SOON)
        self.fault("denoise", list(requests))
        if (wanted := sum(request.rows for request in requests)) > self.most_rows:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {wanted} rows\nand a lot more about the allocator")
        outputs = self.null.denoise(requests)
        for place, request in enumerate(requests):
            if self.poison.get(request.id) == request.step_index:
                outputs[place] = torch.nan
        return outputs

    def step(self, requests: Sequence[RenderRequest], outputs: torch.Tensor) -> torch.Tensor:
        self.fault("step", list(requests))
        return self.null.step(requests, outputs)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.decoded.append(len(latents))
        self.fault("decode", latents)
        return self.null.decode(latents)

    def begun(self) -> list[str]:
        """Wait for the next forward to begin; returns its request ids."""
        assert self._begun.acquire(timeout=SOON)
        return self.forwards[-1]

    def allow(self, forwards: int = 1000) -> None:
        """Let that many forwards end, including the one under way."""
        self._allowed.release(forwards)

    def next(self) -> list[str]:
        """Let the forward under way end, and wait for the next to begin; returns its request ids."""
        self.allow(1)
        return self.begun()


@contextmanager
def running(pipeline: Pipeline, slots: int = 3, line: int = 2, **options: Any) -> Iterator[Engine]:
    """Run an engine of one model, `tiny`; at the end, check that it has no request and the model no user."""
    pins = Pins.of({"tiny": pipeline})
    engine = Engine(pins, slots, line, **options)
    engine.start()
    try:
        yield engine
    finally:
        if isinstance(pipeline, Gated):
            pipeline.allow()
        engine.stop()
    assert engine.progress() == {}
    assert pins._users["tiny"] == 0


def request(request_id: str, steps: int = 2, priority: int = 50, **spec: Any) -> RenderRequest:
    resume = spec.pop("resume", None)
    spec = {"seed": 1, **spec}
    return RenderRequest(
        request_id, RenderSpec(prompt="x", num_inference_steps=steps, **spec), priority=priority, resume=resume
    )


def pixel(seed: int) -> tuple[int, ...]:
    """Return the colour of every pixel in a null picture of that seed."""
    return tuple(colour(seed).mul(255).round().int().flatten().tolist())


def fail(error: BaseException) -> Callable[[Any], None]:
    def raise_it(_: Any) -> None:
        raise error

    return raise_it


def in_thread(call: Callable[[], Any]) -> Future[Any]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future

"""Runs each side in a separate process, with its own threads, models and peak memory; defines a run's results."""

import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

_side: Any = None


@dataclass(frozen=True)
class Run:
    """One timed run of one side."""

    images: int
    seconds: float
    peak_bytes: int
    latencies: tuple[float, ...] = ()
    """Seconds from arrival to the finished picture."""
    calls: int = 0
    """Calls of diffusers' pipeline; 0 for the farm."""

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds

    def latency(self, percent: int) -> float:
        """A percentile of the latencies, in seconds."""
        return quantiles(self.latencies, n=100, method="inclusive")[percent - 1]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints written during a run."""

    rounds: int
    """How often all running requests were checkpointed."""
    objects: int
    bytes: int
    cpu_seconds: float
    """CPU seconds of the threads that pack, upload and delete."""


class Apart:
    """A proxy of an object in a new process; its methods are called by name, one at a time."""

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(make, args)
        )

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._pool.submit(_call, name, args, kwargs).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _begin(make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    global _side
    _side = make(*args)


def _call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return getattr(_side, name)(*args, **kwargs)


class Peak:
    """The peak memory of this process since it was created: torch's allocations on a GPU, else resident memory."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        if self._cuda:
            import torch

            self._memory = torch.cuda
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):  # only Linux can reset its high-water mark
                Path("/proc/self/clear_refs").write_text("5")

    @property
    def bytes(self) -> int:
        """The peak so far; 0 if unknown."""
        if self._cuda:
            return int(self._memory.max_memory_allocated())
        try:
            found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        except OSError:
            return 0
        return 1024 * int(found[1]) if found else 0

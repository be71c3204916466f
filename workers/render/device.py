"""The device, its memory and precision, torch's threads, and side threads of the engine."""

import ctypes
import gc
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

from farm.errors import ModelError

T = TypeVar("T")

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc


def choose_device(device: str | None = None) -> torch.device:
    """The device of that name (`cuda`, `cuda:1`, `cpu`); None is the first GPU, or the CPU if there is none.

    Raises `ModelError` for a device that does not exist.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ModelError(f"no device {device!r} to render on: {reason}") from error
    return chosen


def choose_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The precision of the models: `float32`, `float16` or `bfloat16`.

    None is float32 on the CPU, and on a GPU bfloat16, or float16 on a chip without bfloat16. Latents, guidance and
    noise schedulers are always in float32. Raises `ModelError`.
    """
    if dtype is None:
        if device.type == "cpu":
            return torch.float32
        supported = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if supported else torch.float16
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise ModelError(f"no precision {dtype!r}; known are {', '.join(known)}")
    return known[dtype]


def use_threads(count: int) -> None:
    """Let torch's operators use that many threads when this thread calls them, whatever other threads set."""
    torch.get_num_threads()  # a thread's first operator takes the number that any thread set last, so call this before
    torch.set_num_threads(count)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, instead of returning it to the kernel between two operators.

    A forward on the CPU frees and allocates the same large blocks again and again, and each returned page costs a page
    fault: a seventh of the time of a small model's forward. Has no effect on other C libraries.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((_M_MMAP_THRESHOLD, 2**30), (_M_TRIM_THRESHOLD, 2**30), (_M_TOP_PAD, 2**28)):
            libc.mallopt(parameter, value)


def memory(device: torch.device) -> tuple[int, int] | None:
    """The used and total bytes of a device's memory, with those of other processes; None if unknown.

    On the CPU, the memory of this process and of the machine, or the limit of its container or of the process.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
        used = page * int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return None
    with suppress(OSError, ValueError):  # not a number if there is no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    with suppress(OSError, ValueError, ImportError):
        import resource  # not available on every platform

        limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
        total = min(total, limit if limit != resource.RLIM_INFINITY else total)
    return used, total


def free_memory() -> None:
    """Free the device memory of dropped pipelines, whose parts form reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class SideThread:
    """A thread beside the engine's: on a GPU with its own stream, on the CPU with one core."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=use_threads, initargs=(1,))
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._began: float | None = None

    @property
    def busy_seconds(self) -> float:
        """The age of its current call on a GPU; 0 if there is none, and on the CPU."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def answered(self) -> None:
        """Reset `busy_seconds` within a call: the device has answered, and does not hang."""
        if self._began is not None:
            self._began = time.monotonic()

    def run(self, device: torch.device, call: Callable[[], T]) -> T:
        """Make a call in this thread and return its result, or raise its error; on a GPU after its work has ended."""
        return self.start(device, call).result()

    def start(self, device: torch.device, call: Callable[[], T]) -> Future[T]:
        """Queue a call in this thread."""
        return self._pool.submit(self._call, device, call)

    def _call(self, device: torch.device, call: Callable[[], T]) -> T:
        self._began = None if device.type == "cpu" else time.monotonic()
        try:
            return self._on_stream(device, call)
        finally:
            self._began = None

    @torch.inference_mode()
    def _on_stream(self, device: torch.device, call: Callable[[], T]) -> T:
        if device.type != "cuda":
            return call()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._streams[device]):
            made = call()
        self._streams[device].synchronize()
        return made

    def close(self) -> None:
        """End the thread after its queued calls."""
        self._pool.shutdown(wait=False)

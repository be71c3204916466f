"""Where to render, in which precision, and what runs beside the engine's thread."""

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
    """The device of that name (`cuda`, `cuda:1`, `cpu`); None is the first GPU, or else the CPU.

    Raises `ModelError` if there is no such device here.
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
    """The precision the models run in: `float32`, `float16` or `bfloat16`.

    None is float32 on the CPU; on a GPU bfloat16, or float16 where the chip has no bfloat16.
    Latents, guidance and noise schedulers stay in float32 whatever this is. Raises `ModelError`.
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
    """Let torch's operators use so many threads when they are called from this one, whatever others set."""
    torch.get_num_threads()  # a thread's first operator takes over the number that was set last anywhere: make it now
    torch.set_num_threads(count)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, instead of giving it back between two operators.

    A forward on the CPU frees and takes the same large blocks over and over, and each page given back costs a fault:
    a seventh of a small model's forward. Does nothing where the library is not glibc.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((_M_MMAP_THRESHOLD, 2**30), (_M_TRIM_THRESHOLD, 2**30), (_M_TOP_PAD, 2**28)):
            libc.mallopt(parameter, value)


def memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes used and bytes there are of a device's memory, by whoever uses it; None if that can't be told.

    On the CPU it is this process' part of the machine's memory, or of what its container or its limits allow.
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
    with suppress(OSError, ValueError):  # a number only where there is a limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    with suppress(OSError, ValueError, ImportError):
        import resource  # not on every platform

        limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
        total = min(total, limit if limit != resource.RLIM_INFINITY else total)
    return used, total


def free_memory() -> None:
    """Give back to the device what a pipeline left: its parts refer to each other, so that counting does not do."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Side:
    """One thread for work beside the engine's: on a GPU with a stream of its own, on the CPU with one core."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=use_threads, initargs=(1,))
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._began: float | None = None

    @property
    def busy_seconds(self) -> float:
        """How long a device beside the CPU has worked for it by now, 0 when it does not."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def answered(self) -> None:
        """Tell, amid what it does, that the device has done something: what comes next has its time anew."""
        if self._began is not None:
            self._began = time.monotonic()

    def run(self, device: torch.device, call: Callable[[], T]) -> T:
        """Call it there and wait for what it returns, or raise what it raises; on a GPU until it is really done."""
        return self.start(device, call).result()

    def start(self, device: torch.device, call: Callable[[], T]) -> Future[T]:
        """Call it there, after what was started before."""
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
        """End the thread when it has done what was started."""
        self._pool.shutdown(wait=False)

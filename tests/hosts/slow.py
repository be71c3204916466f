"""A slow, lossy link that delays every packet and drops some, in this process because few kernels have `netem`."""

import fcntl
import os
import random
import select
import struct
import threading
import time
from collections import deque
from contextlib import suppress

from tests.servers import missing

_TUNSETIFF = 0x4004_54CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_MOST_BYTES = 2**16
_REST_SECONDS = 0.2


def end(name: str) -> int:
    """Create one end of a link: a tun interface in the calling thread's namespace. Closing it deletes the interface."""
    try:
        made = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        missing(f"no slow network: {error}")
    fcntl.ioctl(made, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return made


class Slow:
    """Passes packets between two ends, each way after `seconds`, except for the fraction `loss`, which it drops."""

    def __init__(self, one: int, other: int, seconds: float, loss: float) -> None:
        self._other = {one: other, other: one}
        self._seconds, self._loss = seconds, loss
        self._rng = random.Random(0)
        self._under_way: deque[tuple[float, int, bytes]] = deque()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cable", daemon=True)
        self.passed = self.lost = 0
        """Number of packets passed and lost."""
        self._thread.start()

    def close(self) -> None:
        """Stop passing packets; the caller closes the ends."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            wait = self._under_way[0][0] - time.monotonic() if self._under_way else _REST_SECONDS
            ready, _, _ = select.select(list(self._other), [], [], max(0.0, min(wait, _REST_SECONDS)))
            for one in ready:
                self._take(one)
            while self._under_way and self._under_way[0][0] <= time.monotonic():
                _, there, packet = self._under_way.popleft()
                with suppress(OSError):  # a full link drops packets too
                    os.write(there, packet)

    def _take(self, one: int) -> None:
        with suppress(BlockingIOError):
            while True:
                packet = os.read(one, _MOST_BYTES)
                if self._rng.random() < self._loss:
                    self.lost += 1
                else:
                    self.passed += 1
                    self._under_way.append((time.monotonic() + self._seconds, self._other[one], packet))

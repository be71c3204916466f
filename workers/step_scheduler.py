"""Which requests share the next forward: a bounded waiting line, slots, and turns between forward keys.

Pure: no tensor, no clock, no thread. Whoever owns one serialises the calls.
"""

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardKey:
    """Says exactly which requests may share a forward: those with equal keys, and no others."""

    model: str
    shape: tuple[int, ...]
    """Of one request's latents, without the row dimension."""
    dtype: str


class StepScheduler:
    """A line of waiting requests, `slots` running ones, and whose turn it is.

    Requests take slots first come, first served. Keys with running requests take turns, one forward each: a key
    waits for at most one forward of every other key, however many requests the others have.
    """

    def __init__(self, slots: int, line: int) -> None:
        if slots < 1 or line < 1:
            raise ValueError(f"needs at least one slot and a line of one, not {slots} and {line}")
        self.slots = slots
        self.line = line
        self._waiting: OrderedDict[str, ForwardKey] = OrderedDict()
        self._running: dict[str, ForwardKey] = {}
        self._turns: OrderedDict[ForwardKey, list[str]] = OrderedDict()

    @property
    def waiting(self) -> tuple[str, ...]:
        """Ids in the line, next first."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[str, ...]:
        """Ids that hold a slot, in the order they took it."""
        return tuple(self._running)

    @property
    def full(self) -> bool:
        """Whether the waiting line has no room."""
        return len(self._waiting) >= self.line

    def enqueue(self, request_id: str, key: ForwardKey) -> None:
        """Put a request at the end of the line. Raises `ValueError` if the line is full or has the id."""
        if self.full:
            raise ValueError(f"the line of {self.line} is full")
        if request_id in self._waiting or request_id in self._running:
            raise ValueError(f"{request_id} is here already")
        self._waiting[request_id] = key

    def admit(self) -> tuple[str, ...]:
        """Give free slots to the head of the line; the ids that got one."""
        admitted = []
        while self._waiting and len(self._running) < self.slots:
            request_id, key = self._waiting.popitem(last=False)
            self._running[request_id] = key
            self._turns.setdefault(key, []).append(request_id)
            admitted.append(request_id)
        return tuple(admitted)

    def next_forward(self) -> tuple[str, ...]:
        """The ids that share the next forward: all that run under the key whose turn it is; empty if none runs."""
        if not self._turns:
            return ()
        key = next(iter(self._turns))
        self._turns.move_to_end(key)
        return tuple(self._turns[key])

    def leave(self, request_id: str) -> None:
        """Forget a request, waiting or running; its slot is free at once. Unknown ids are ignored."""
        if self._waiting.pop(request_id, None) is not None:
            return
        key = self._running.pop(request_id, None)
        if key is not None:
            self._turns[key].remove(request_id)
            if not self._turns[key]:
                del self._turns[key]

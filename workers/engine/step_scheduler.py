"""The choice of the requests that share the next forward: a bounded queue, slots, and turns between forward keys.

Pure: no tensor, no clock, no thread. The owner serialises the calls.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardKey:
    """Requests may share a forward if and only if their keys are equal."""

    model: str
    shape: tuple[int, ...]
    """The shape of one request's latents, without the row dimension."""
    dtype: str
    deterministic: bool = False
    """Whether its forwards have a fixed number of rows, so that a request's bits do not depend on the others."""
    text_tokens: int = 0
    """The length of its texts' embeddings."""


@dataclass(frozen=True)
class _Entry:
    key: ForwardKey
    rows: int
    priority: int


class StepScheduler:
    """A queue of waiting requests, `slots` running ones, and the turns of their forward keys.

    The queue is served by priority, then first come, first served, with one exception: a request may overtake requests
    of other keys while the forwards of its own key have room, but none is overtaken more than `skips` times. A key
    never has more rows running than a forward takes (`most_rows`), so that a running request is in every forward of its
    key. Keys take turns, one forward each. A priority of `urgent` or more does not wait: its key has the next turn or
    the one after, and it preempts running requests of lower priority, which resume before others of their priority.
    """

    def __init__(
        self,
        slots: int,
        line: int,
        *,
        skips: int = 16,
        urgent: int = 90,
        most_rows: Callable[[ForwardKey], int] = lambda _: 2**31,
    ) -> None:
        if slots < 1 or line < 1:
            raise ValueError(f"needs at least one slot and a line of one, not {slots} and {line}")
        self.slots = slots
        self.line = line
        self.skips = skips
        self.urgent = urgent
        self._most_rows = most_rows
        self._waiting: OrderedDict[str, _Entry] = OrderedDict()  # in serving order
        self._overtaken: dict[str, int] = {}
        self._running: dict[str, _Entry] = {}
        self._turns: OrderedDict[ForwardKey, list[str]] = OrderedDict()
        self._preempted: set[str] = set()

    @property
    def waiting(self) -> tuple[str, ...]:
        """The ids in the queue with the preempted ones, next first."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[str, ...]:
        """The ids with a slot, in the order in which they got it."""
        return tuple(self._running)

    @property
    def full(self) -> bool:
        """Whether the queue is full; preempted requests do not count."""
        return len(self._waiting) - len(self._preempted) >= self.line

    def enqueue(self, request_id: str, key: ForwardKey, rows: int = 1, priority: int = 0) -> None:
        """Queue a request behind those of its priority.

        Raises `ValueError` for a known id, and while the queue is full, except for an urgent request.
        """
        if self.full and priority < self.urgent:
            raise ValueError(f"the line of {self.line} is full")
        if request_id in self._waiting or request_id in self._running:
            raise ValueError(f"{request_id} is here already")
        self._insert(request_id, _Entry(key, rows, priority), behind_equals=True)

    def admit(self) -> tuple[str, ...]:
        """Give slots to the next requests; returns their ids, with those of preempted ones that resume."""
        admitted = []
        while (request_id := self._next()) is not None:
            self._take(request_id)
            admitted.append(request_id)
        return tuple(admitted)

    def next_forward(self) -> tuple[str, ...]:
        """The ids of the next forward: all running requests of the key whose turn it is; empty if none runs."""
        if not self._turns:
            return ()
        key = next(iter(self._turns))
        self._turns.move_to_end(key)
        return tuple(self._turns[key])

    def remove(self, request_id: str) -> None:
        """Remove a request, waiting or running; its slot is free at once. Unknown ids are ignored."""
        self._overtaken.pop(request_id, None)
        self._preempted.discard(request_id)
        if self._waiting.pop(request_id, None) is None and request_id in self._running:
            self._stop(request_id)

    def _insert(self, request_id: str, entry: _Entry, *, behind_equals: bool) -> None:
        after = [
            other
            for other, waiting in self._waiting.items()
            if waiting.priority < entry.priority or (waiting.priority == entry.priority and not behind_equals)
        ]
        self._waiting[request_id] = entry
        for other in after:
            self._waiting.move_to_end(other)

    def _next(self) -> str | None:
        """The id that gets a slot now, after preemptions if it is urgent; None if no request can."""
        passed: list[str] = []
        full: set[ForwardKey] = set()
        for request_id, entry in self._waiting.items():
            if passed and entry.priority < self._waiting[passed[0]].priority:
                break
            victims = None if entry.key in full else self._victims(entry)
            if victims is None:
                if len(self._running) >= self.slots:
                    return None
                # A request of another key that goes first does not delay it; a smaller request of its own key would.
                full.add(entry.key)
                continue
            if not victims and self._opens_key(entry) and self._may_wait(request_id, entry):
                passed.append(request_id)
                continue
            for victim in victims:
                self._preempt(victim)
            for other in passed:
                self._overtaken[other] = self._overtaken.get(other, 0) + 1
            return request_id
        return passed[0] if passed else None

    def _victims(self, entry: _Entry) -> list[str] | None:
        """The running requests to preempt for it: empty if a slot is free, None if it has to wait.

        An urgent request preempts the lowest priority first, then its own key, then the latest.
        """
        no_slot = len(self._running) >= self.slots
        if not no_slot and self._fits(entry):
            return []
        if entry.priority < self.urgent:
            return None
        latest = [other for other in reversed(self._running) if self._running[other].priority < self.urgent]
        latest.sort(key=lambda other: (self._running[other].priority, self._running[other].key != entry.key))
        victims: list[str] = []
        for other in latest:
            if self._running[other].key == entry.key and not self._fits(entry, victims):
                victims.append(other)
        if not self._fits(entry, victims):
            return None
        return victims or latest[:1] or None

    def _fits(self, entry: _Entry, without: Sequence[str] = ()) -> bool:
        """Whether it fits into the forward of its key; a single request always does."""
        beside = [self._running[other].rows for other in self._turns.get(entry.key, ()) if other not in without]
        return not beside or sum(beside) + entry.rows <= self._most_rows(entry.key)

    def _opens_key(self, entry: _Entry) -> bool:
        """Whether it would add a key, and thus a forward, to the running keys."""
        return bool(self._turns) and entry.key not in self._turns

    def _may_wait(self, request_id: str, entry: _Entry) -> bool:
        """Whether it may be overtaken: at most `skips` times, and never if it is urgent or was preempted."""
        patient = entry.priority < self.urgent and request_id not in self._preempted
        return patient and self._overtaken.get(request_id, 0) < self.skips

    def _take(self, request_id: str) -> None:
        entry = self._waiting.pop(request_id)
        self._overtaken.pop(request_id, None)
        self._preempted.discard(request_id)
        self._running[request_id] = entry
        self._turns.setdefault(entry.key, []).append(request_id)
        if entry.priority >= self.urgent:
            # The turn after the next, so that a stream of urgent requests leaves every second turn to the others.
            upcoming = next(iter(self._turns))
            self._turns.move_to_end(entry.key, last=False)
            self._turns.move_to_end(upcoming, last=False)

    def _stop(self, request_id: str) -> _Entry:
        entry = self._running.pop(request_id)
        self._turns[entry.key].remove(request_id)
        if not self._turns[entry.key]:
            del self._turns[entry.key]
        return entry

    def _preempt(self, request_id: str) -> None:
        entry = self._stop(request_id)
        self._preempted.add(request_id)
        self._insert(request_id, entry, behind_equals=False)

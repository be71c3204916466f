"""Which requests share the next forward: a bounded waiting line, slots, and turns between forward keys.

Pure: no tensor, no clock, no thread. Whoever owns one serialises the calls.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardKey:
    """Says exactly which requests may share a forward: those with equal keys, and no others."""

    model: str
    shape: tuple[int, ...]
    """Of one request's latents, without the row dimension."""
    dtype: str
    deterministic: bool = False
    """Whether its forwards have one fixed shape, so that neighbours can't show in a single bit."""


@dataclass(frozen=True)
class _Entry:
    key: ForwardKey
    rows: int
    priority: int


class StepScheduler:
    """A line of waiting requests, `slots` running ones, and whose turn it is.

    The line is served by priority, then first come, first served, with one exception: a request may go ahead of one of
    another key while its own key's forwards have room, but no request is passed more than `skips` times. A key never
    has more rows running than one forward takes (`most_rows`), so whoever has a slot is in every forward of its key.
    Keys take turns, one forward each. From `urgent` on a priority does not wait: its key has the next turn or the one
    after, and running requests below it are put aside, which go on before anybody of their own priority starts.
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
        self._passed: dict[str, int] = {}
        self._running: dict[str, _Entry] = {}
        self._turns: OrderedDict[ForwardKey, list[str]] = OrderedDict()
        self._aside: set[str] = set()

    @property
    def waiting(self) -> tuple[str, ...]:
        """Ids in the line, next first; those put aside among them."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[str, ...]:
        """Ids that hold a slot, in the order they took it."""
        return tuple(self._running)

    @property
    def full(self) -> bool:
        """Whether the waiting line has no room; who was put aside takes none."""
        return len(self._waiting) - len(self._aside) >= self.line

    def enqueue(self, request_id: str, key: ForwardKey, rows: int = 1, priority: int = 0) -> None:
        """Put a request in line behind those of its priority.

        Raises `ValueError` if it is here already, or if the line is full and it is not urgent.
        """
        if self.full and priority < self.urgent:
            raise ValueError(f"the line of {self.line} is full")
        if request_id in self._waiting or request_id in self._running:
            raise ValueError(f"{request_id} is here already")
        self._insert(request_id, _Entry(key, rows, priority), behind_equals=True)

    def admit(self) -> tuple[str, ...]:
        """Give slots to whoever is next; the ids that got one, of them those that had been put aside too."""
        admitted = []
        while (request_id := self._next()) is not None:
            self._take(request_id)
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
        self._passed.pop(request_id, None)
        self._aside.discard(request_id)
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
        """Who takes a slot now, after making room if it is urgent; None if nobody can."""
        passed: list[str] = []
        full: set[ForwardKey] = set()
        for request_id, entry in self._waiting.items():
            if passed and entry.priority < self._waiting[passed[0]].priority:
                break
            lenders = None if entry.key in full else self._lenders(entry)
            if lenders is None:
                if len(self._running) >= self.slots:
                    return None
                # Whoever has another key loses it nothing by going ahead; a smaller one of its own key would.
                full.add(entry.key)
                continue
            if not lenders and self._opens_key(entry) and self._may_wait(request_id, entry):
                passed.append(request_id)
                continue
            for lender in lenders:
                self._put_aside(lender)
            for other in passed:
                self._passed[other] = self._passed.get(other, 0) + 1
            return request_id
        return passed[0] if passed else None

    def _lenders(self, entry: _Entry) -> list[str] | None:
        """Who must be put aside for it to run: nobody if there is room, and None if it has to wait.

        An urgent request takes from the lowest priority, from its own key if that can be, from the latest.
        """
        no_slot = len(self._running) >= self.slots
        if not no_slot and self._fits(entry):
            return []
        if entry.priority < self.urgent:
            return None
        latest = [other for other in reversed(self._running) if self._running[other].priority < self.urgent]
        latest.sort(key=lambda other: (self._running[other].priority, self._running[other].key != entry.key))
        lenders: list[str] = []
        for other in latest:
            if self._running[other].key == entry.key and not self._fits(entry, lenders):
                lenders.append(other)
        if not self._fits(entry, lenders):
            return None
        return lenders or latest[:1] or None

    def _fits(self, entry: _Entry, without: Sequence[str] = ()) -> bool:
        """Whether its key's forward has room; a forward takes one request, however many rows that has."""
        beside = [self._running[other].rows for other in self._turns.get(entry.key, ()) if other not in without]
        return not beside or sum(beside) + entry.rows <= self._most_rows(entry.key)

    def _opens_key(self, entry: _Entry) -> bool:
        """Whether it would open a new key, and so a forward of its own, while others run."""
        return bool(self._turns) and entry.key not in self._turns

    def _may_wait(self, request_id: str, entry: _Entry) -> bool:
        """Whether others may go ahead of it: not of an urgent one, nor one put aside, nor more than `skips` times."""
        patient = entry.priority < self.urgent and request_id not in self._aside
        return patient and self._passed.get(request_id, 0) < self.skips

    def _take(self, request_id: str) -> None:
        entry = self._waiting.pop(request_id)
        self._passed.pop(request_id, None)
        self._aside.discard(request_id)
        self._running[request_id] = entry
        self._turns.setdefault(entry.key, []).append(request_id)
        if entry.priority >= self.urgent:
            # The turn after the next, so that a stream of urgent ones leaves every other turn to the rest.
            upcoming = next(iter(self._turns))
            self._turns.move_to_end(entry.key, last=False)
            self._turns.move_to_end(upcoming, last=False)

    def _stop(self, request_id: str) -> _Entry:
        entry = self._running.pop(request_id)
        self._turns[entry.key].remove(request_id)
        if not self._turns[entry.key]:
            del self._turns[entry.key]
        return entry

    def _put_aside(self, request_id: str) -> None:
        entry = self._stop(request_id)
        self._aside.add(request_id)
        self._insert(request_id, entry, behind_equals=False)

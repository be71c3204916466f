"""Which batches the next jobs of a model come from: strict priority, then a fair share of device seconds.

Start-time fair queueing (Goyal, Vin, Cheng 1996), in two levels: between the owners of one priority, and between the
batches of an owner. Each has a virtual time, the device seconds charged so far divided by the weight; the one with the
least virtual time goes next. Nothing here knows a clock or a database.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

LEAST_WINDOW = 4
"""The least number of jobs of a model in Redis, however few slots there are: a worker that starts finds some."""
UNKNOWN_SECONDS = 1.0
"""The expected cost of a job while no job of its model has been measured."""
_TINY_SECONDS = 1e-6


@dataclass
class Owner:
    """The owner of batches."""

    name: str
    weight: float = 1.0
    virtual_time: float = 0.0
    room: int | None = None
    """How many more of its jobs may be queued; None means any number."""


@dataclass
class Share:
    """A batch with jobs that could be dispatched now."""

    batch_id: str
    owner: str
    priority: int
    weight: float = 1.0
    virtual_time: float = 0.0
    seconds: float = UNKNOWN_SECONDS
    """The expected cost of one of its jobs, in device seconds."""
    in_flight: int = 0
    """How many of its jobs are queued or running."""
    unserved_seconds: float = 0.0
    """For how long none of its jobs has been in flight."""

    @property
    def start(self) -> float:
        """The start tag of the oldest of its jobs in flight, or of its last one."""
        return self.virtual_time - max(1, self.in_flight) * self.seconds / self.weight


@dataclass(frozen=True)
class Served:
    """A turn: one job of a batch is next."""

    batch_id: str
    seconds: float
    """The charge for it."""
    priority: int
    """Its batch's, or the highest in line if its batch would have starved."""


@dataclass
class _Level:
    """The line of one priority: a heap of owners, and a heap of batches for each."""

    owners: list[tuple[float, int, str]] = field(default_factory=list)
    batches: dict[str, list[tuple[float, int, str]]] = field(default_factory=dict)


class FairLine:
    """The line of a model's batches, as one pass of the dispatcher serves it.

    `shares` come in the order in which the batches were accepted, which breaks ties. What `take` hands out is charged
    at once to the `virtual_time` of the shares and owners that were given.
    """

    def __init__(self, shares: Iterable[Share], owners: Iterable[Owner], *, starvation_seconds: float) -> None:
        self.shares = {share.batch_id: share for share in shares}
        self.owners = {owner.name: owner for owner in owners}
        self._out: dict[str, Share] = {}
        self._starving = sorted(
            (share.batch_id for share in self.shares.values() if share.unserved_seconds >= starvation_seconds),
            key=lambda batch_id: self.shares[batch_id].unserved_seconds,
            reverse=True,
        )
        self._highest = max((share.priority for share in self.shares.values()), default=0)
        for priority in {share.priority for share in self.shares.values()}:
            _catch_up([share for share in self.shares.values() if share.priority == priority], self.owners)

    def take(self, count: int) -> list[Served]:
        """The next jobs in serving order, fewer than `count` if no more may be served."""
        taken: list[Served] = []
        while self._starving and len(taken) < count:
            share = self.shares.get(self._starving.pop(0))
            if share is not None and self._room(share.owner) > 0:
                taken.append(self._charge(share, max(share.priority, self._highest)))
        for priority in sorted({share.priority for share in self.shares.values()}, reverse=True):
            if len(taken) >= count:
                break
            self._take_level(priority, count, taken)
        return taken

    def give_back(self, served: Served) -> None:
        """Refund a batch the charge for a turn that found no job, and skip the batch from then on."""
        if served.batch_id in self.shares:
            self._out[served.batch_id] = self.shares.pop(served.batch_id)
        share = self.share(served.batch_id)
        owner = self.owners[share.owner]
        share.virtual_time -= served.seconds / share.weight
        owner.virtual_time -= served.seconds / owner.weight
        if owner.room is not None:
            owner.room += 1

    def share(self, batch_id: str) -> Share:
        """A batch's share, whether it still is in line or not."""
        return self.shares.get(batch_id) or self._out[batch_id]

    def _take_level(self, priority: int, count: int, taken: list[Served]) -> None:
        level = _Level()
        for number, share in enumerate(self.shares.values()):
            if share.priority == priority and self._room(share.owner) > 0:
                level.batches.setdefault(share.owner, []).append((share.virtual_time, number, share.batch_id))
        for name, line in level.batches.items():
            heapq.heapify(line)
            level.owners.append((self.owners[name].virtual_time, line[0][1], name))
        heapq.heapify(level.owners)
        while level.owners and len(taken) < count:
            _, number, name = heapq.heappop(level.owners)
            line = level.batches[name]
            share = self.shares[line[0][2]]
            taken.append(self._charge(share, share.priority))
            heapq.heapreplace(line, (share.virtual_time, line[0][1], share.batch_id))
            if self._room(name) > 0:
                heapq.heappush(level.owners, (self.owners[name].virtual_time, number, name))

    def _room(self, name: str) -> float:
        room = self.owners[name].room
        return math.inf if room is None else room

    def _charge(self, share: Share, priority: int) -> Served:
        owner = self.owners[share.owner]
        seconds = max(share.seconds, _TINY_SECONDS)
        share.virtual_time += seconds / share.weight
        owner.virtual_time += seconds / owner.weight
        if owner.room is not None:
            owner.room -= 1
        return Served(share.batch_id, seconds, priority)


def _catch_up(level: list[Share], owners: Mapping[str, Owner]) -> None:
    """Advance the virtual time of new and returning batches and owners to that of the active ones of a priority.

    Idle time earns no credit.
    """
    siblings: dict[str, list[Share]] = defaultdict(list)
    for share in level:
        siblings[share.owner].append(share)
    starts: dict[str, float] = {}
    for name, shares in siblings.items():
        seconds = sum(share.in_flight * share.seconds for share in shares) or max(share.seconds for share in shares)
        starts[name] = owners[name].virtual_time - seconds / owners[name].weight
    busy = {share.owner for share in level if share.in_flight}
    _lift({name: owners[name] for name in siblings}, starts, busy)
    for shares in siblings.values():
        _lift(
            {share.batch_id: share for share in shares},
            {share.batch_id: share.start for share in shares},
            {share.batch_id for share in shares if share.in_flight},
        )


def _lift(all_of_them: Mapping[str, Owner] | Mapping[str, Share], starts: Mapping[str, float], busy: set[str]) -> None:
    served = busy or {name for name, one in all_of_them.items() if one.virtual_time > 0}
    if not served:
        return
    floor = min(starts[name] for name in served)
    for name, one in all_of_them.items():
        # With nothing in flight anywhere, only those that were never served are new.
        if name not in busy and (busy or not one.virtual_time):
            one.virtual_time = max(one.virtual_time, floor)


def window(slots: int, most: int) -> int:
    """How many jobs of a model may be in Redis, for so many slots of live workers.

    Twice the slots: few enough that a small batch behind a large one starts within seconds, enough that no worker waits
    for the next pass.
    """
    return min(most, max(LEAST_WINDOW, 2 * slots))

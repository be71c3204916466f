"""Which batches the next jobs of a model come from: strict priority, then a fair share of device seconds.

Start-time fair queueing (Goyal, Vin, Cheng 1996), in two levels: between the owners of one priority, and between the
batches of an owner. Everybody has a virtual time, the device seconds charged so far divided by the weight; whoever is
least far goes next. Nothing here knows a clock or a database.
"""

import heapq
import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

LEAST_WINDOW = 4
"""How many jobs of a model lie in Redis however few slots there are, so that a worker that starts finds some."""
UNKNOWN_SECONDS = 1.0
"""What a job is taken to cost while nothing of its model has been measured."""
_TINY_SECONDS = 1e-6
_FRESHNESS = 0.2
_REMEMBERED = 10_000


@dataclass
class Owner:
    """Whose batches they are."""

    name: str
    weight: float = 1.0
    virtual_time: float = 0.0
    room: int | None = None
    """How many more jobs of theirs may be queued; None means any number."""


@dataclass
class Share:
    """A batch with jobs that could be dispatched now."""

    batch_id: str
    owner: str
    priority: int
    weight: float = 1.0
    virtual_time: float = 0.0
    seconds: float = UNKNOWN_SECONDS
    """What one of its jobs is expected to cost a device."""
    in_flight: int = 0
    """How many of its jobs are queued or running."""
    unserved_seconds: float = 0.0
    """Since when none of its jobs has been in flight."""

    @property
    def start(self) -> float:
        """The start tag of the oldest of its jobs in flight, or of its last one."""
        return self.virtual_time - max(1, self.in_flight) * self.seconds / self.weight


@dataclass(frozen=True)
class Served:
    """One job of a batch is next."""

    batch_id: str
    seconds: float
    """What it was charged with."""
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
        """Undo what a batch was charged for a job that it did not have, and take no more from it."""
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
    """Let who comes newly, or comes back, start where those of one priority are that are being served.

    Who has nothing in flight gets no credit for the time when it had nothing to do.
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
        # With nothing in flight anywhere, only who has never been served is new.
        if name not in busy and (busy or not one.virtual_time):
            one.virtual_time = max(one.virtual_time, floor)


@dataclass(frozen=True)
class Charge:
    """What a dispatched job was charged with, to whom."""

    batch_id: str
    owner: str
    model: str
    seconds: float


@dataclass(frozen=True)
class Corrections:
    """By how many device seconds batches and owners were charged too little (or too much, where negative)."""

    batches: Mapping[str, float]
    owners: Mapping[str, float]


class Ledger:
    """What jobs were charged with when they were dispatched, until it is known what they took.

    It also learns from that what a job of a batch or a model costs: the mean of its finished ones, recent ones
    weighing more.
    """

    def __init__(self) -> None:
        self._open: dict[str, Charge] = {}
        self._of_batch: OrderedDict[str, float] = OrderedDict()
        self._of_model: dict[str, float] = {}

    def open(self) -> list[str]:
        """The jobs of which it is not known yet what they took."""
        return list(self._open)

    def knows(self, batch_id: str) -> bool:
        """Whether a job of the batch has been measured."""
        return batch_id in self._of_batch

    def seconds(self, batch_id: str, model: str) -> float:
        """What a job of that batch is expected to cost."""
        return self._of_batch.get(batch_id) or self._of_model.get(model) or UNKNOWN_SECONDS

    def measured(self, batch_id: str, model: str, seconds: float) -> None:
        """Learn what a job took."""
        for means, name in ((self._of_batch, batch_id), (self._of_model, model)):
            mean = means.get(name)
            means[name] = seconds if mean is None else mean + _FRESHNESS * (seconds - mean)
        self._of_batch.move_to_end(batch_id)
        if len(self._of_batch) > _REMEMBERED:
            self._of_batch.popitem(last=False)

    def charge(self, job_id: str, charge: Charge) -> None:
        """Note what a job was charged with."""
        self._open[job_id] = charge

    def settle(self, took: Mapping[str, float | None]) -> Corrections:
        """Close the charges of jobs: what each took, 0 if it was not rendered, None if nobody measured it."""
        batches: defaultdict[str, float] = defaultdict(float)
        owners: defaultdict[str, float] = defaultdict(float)
        for job_id, seconds in took.items():
            charge = self._open.pop(job_id, None)
            if charge is None or seconds is None:
                continue
            if seconds > 0:
                self.measured(charge.batch_id, charge.model, seconds)
            batches[charge.batch_id] += seconds - charge.seconds
            owners[charge.owner] += seconds - charge.seconds
        return Corrections(batches, owners)


def window(slots: int, most: int) -> int:
    """How many jobs of a model may lie in Redis, with so many slots of live workers.

    Twice the slots: few enough for a small batch that comes in behind a large one to start within seconds, enough for
    no worker to wait for the next pass.
    """
    return min(most, max(LEAST_WINDOW, 2 * slots))

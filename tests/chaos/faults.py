"""The faults: each is a context manager that injects the fault on entry and undoes it on exit."""

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass

import redis
import sqlalchemy as sa

from farm.errors import ServiceUnavailable
from farm.jobs import leadership
from farm.jobs.conditions import ACCEPTED
from farm.jobs.schema import BatchRow, JobRow
from farm.jobs.states import ACTIVE
from farm.specs.spec import URGENT
from tests.chaos.client import hand_in
from tests.chaos.farm import LEASE_SECONDS, ChaosFarm
from tests.chaos.orders import order


@dataclass(frozen=True)
class Struck:
    """An injected fault: its description, and how long it should last."""

    what: str
    seconds: float = 0.0


Fault = Callable[[ChaosFarm, random.Random], AbstractContextManager[Struck]]


@contextmanager
def kill_a_worker(farm: ChaosFarm, rng: random.Random) -> Iterator[Struck]:
    """SIGKILL; the worker is restarted under the same name."""
    worker = farm.some(rng, farm.workers)
    worker.kill()
    yield Struck(f"{worker.name} killed")


@contextmanager
def freeze_a_worker(farm: ChaosFarm, rng: random.Random) -> Iterator[Struck]:
    """SIGSTOP for longer than its leases: when it wakes, its jobs are rendered elsewhere."""
    worker, seconds = farm.some(rng, farm.workers), LEASE_SECONDS + rng.uniform(0.7, 2.5)
    with worker.stopped():
        yield Struck(f"{worker.name} frozen", seconds)


@contextmanager
def drain_a_worker(farm: ChaosFarm, rng: random.Random) -> Iterator[Struck]:
    """SIGTERM: it hands back the jobs it can't finish, and is restarted under the same name."""
    worker = farm.some(rng, farm.workers)
    worker.drain()
    yield Struck(f"{worker.name} told to stop")


@contextmanager
def kill_a_dispatcher(farm: ChaosFarm, rng: random.Random) -> Iterator[Struck]:
    """SIGKILL, at any point between its writes to SQL and to Redis."""
    dispatcher = farm.some(rng, farm.dispatchers)
    dispatcher.kill()
    yield Struck(f"{dispatcher.name} killed")


@contextmanager
def freeze_a_dispatcher(farm: ChaosFarm, rng: random.Random) -> Iterator[Struck]:
    """SIGSTOP the leader, perhaps inside a transaction: when it wakes, it may have lost the lead to another."""
    dispatcher, seconds = farm.leader(rng), rng.uniform(1.0, 1.5 * leadership.LEASE_SECONDS)
    with dispatcher.stopped():
        yield Struck(f"{dispatcher.name} frozen", seconds)


@contextmanager
def kill_the_client(farm: ChaosFarm, rng: random.Random) -> Iterator[Struck]:
    """SIGKILL while it submits or waits; the restarted client finds out whether the submission was accepted."""
    before = len(farm.journal.read())
    # Right after it starts a submission, or at a random moment.
    farm.comes_true(lambda: len(farm.journal.read()) > before or not farm.client.running, rng.choice((0.0, 2.0)))
    farm.client.kill()
    yield Struck("client killed")


@contextmanager
def break_off_a_submission(farm: ChaosFarm, rng: random.Random) -> Iterator[Struck]:
    """SIGKILL a client in the middle of a submission of thousands of jobs."""
    name = f"half-{rng.getrandbits(32):08x}"
    client = farm.breaking_off(name)
    client.start()
    client.leave()
    halfway = farm.comes_true(lambda: name in farm.journal.names("halfway") or not client.running, 20)
    client.kill()
    yield Struck(f"submission {name} broken off{'' if halfway else ', before it got far'}")


@contextmanager
def flush_redis(farm: ChaosFarm, rng: random.Random) -> Iterator[Struck]:
    """FLUSHALL: every message is lost."""
    try:
        with redis.Redis.from_url(farm.settings.broker_url, socket_timeout=2) as client:
            client.flushall()
        yield Struck("Redis flushed")
    except redis.RedisError as error:
        yield Struck(f"Redis not flushed ({type(error).__name__})")


@contextmanager
def take_redis_away(farm: ChaosFarm, rng: random.Random) -> Iterator[Struck]:
    """SIGKILL Redis, and restart it on the same port."""
    with farm.redis.away():
        yield Struck("Redis away", rng.uniform(0.0, 3.0))
    farm.wait_until(farm.redis.answers, "Redis answers again")


@contextmanager
def take_sql_away(farm: ChaosFarm, rng: random.Random) -> Iterator[Struck]:
    """Crash and restart PostgreSQL; SQLite has no server to stop, so hold its write lock."""
    seconds = rng.uniform(0.0, 1.5 * LEASE_SECONDS)
    if farm.postgres is not None:
        farm.postgres.crash()
        try:
            yield Struck("PostgreSQL crashed", seconds)
        finally:
            farm.postgres.start()
        return
    with farm.db.write() as session:
        session.execute(sa.text("SELECT 1"))
        yield Struck("SQLite locked", seconds)


@contextmanager
def take_s3_away(farm: ChaosFarm, rng: random.Random) -> Iterator[Struck]:
    """SIGKILL the object store, and restart it on the same port."""
    with farm.s3.away():
        yield Struck("S3 away", rng.uniform(1.0, 4.0))
    farm.wait_until(farm.s3.answers, "S3 answers again")


@contextmanager
def freeze_s3(farm: ChaosFarm, rng: random.Random) -> Iterator[Struck]:
    """SIGSTOP the object store: the kernel still accepts connections and data, but no request is answered."""
    with farm.s3.stopped():
        yield Struck("S3 frozen", rng.uniform(1.0, 4.0))


@contextmanager
def slow_s3_down(farm: ChaosFarm, rng: random.Random) -> Iterator[Struck]:
    """Delay every chunk sent to or received from the object store."""
    farm.proxy.delay_seconds = rng.uniform(0.2, 1.0)
    try:
        yield Struck(f"S3 slow by {farm.proxy.delay_seconds:.1f} s", rng.uniform(2.0, 4.0))
    finally:
        farm.proxy.delay_seconds = 0.0


@contextmanager
def cut_s3_off(farm: ChaosFarm, rng: random.Random) -> Iterator[Struck]:
    """Break every connection to the object store in mid-transfer."""
    farm.proxy.cut()
    yield Struck("connections to S3 cut")


@contextmanager
def cancel_a_batch(farm: ChaosFarm, rng: random.Random) -> Iterator[Struck]:
    """Cancel a batch in progress."""
    name, answer = _under_way(farm, rng), "without an answer"
    if name is None:
        yield Struck("no batch to cancel")
        return
    farm.journal.write("cancels", name)
    with suppress(ServiceUnavailable):
        answer = f"{farm.farm.batch(name).cancel()} jobs"
    yield Struck(f"{name} cancelled, {answer}")


@contextmanager
def pause_a_batch(farm: ChaosFarm, rng: random.Random) -> Iterator[Struck]:
    """Pause a batch in progress and resume it: its running jobs are handed back and continue afterwards."""
    name, answer = _under_way(farm, rng), "without an answer"
    if name is None:
        yield Struck("no batch to pause")
        return
    with suppress(ServiceUnavailable):
        answer = f"{farm.farm.batch(name).pause()} jobs"
    yield Struck(f"{name} paused, {answer}", rng.uniform(0.5, 3.0))
    farm.wait_until(lambda: farm.farm.batch(name).resume() >= 0, f"{name} goes on")


def _under_way(farm: ChaosFarm, rng: random.Random) -> str | None:
    """Name of a random unfinished batch. Urgent batches are left out because they end too soon."""
    active = sa.exists().where(JobRow.batch_id == BatchRow.id, JobRow.state.in_(ACTIVE)).correlate(BatchRow)
    names = sa.select(BatchRow.name).where(ACCEPTED, active, BatchRow.priority < URGENT).order_by(BatchRow.name)
    place = rng.random()
    try:
        with farm.db.read() as session:
            found = session.scalars(names).all()
    except ServiceUnavailable:
        return None
    return found[int(place * len(found))] if found else None


@contextmanager
def ask_urgently(farm: ChaosFarm, rng: random.Random) -> Iterator[Struck]:
    """Submit a small urgent batch."""
    name = f"urgent-{rng.getrandbits(32):08x}"
    wanted = order(farm.seed, name, farm.scale.small, priority=rng.randint(90, 100))
    answered = hand_in(farm.farm, wanted, farm.journal)
    yield Struck(f"{wanted.name} {'submitted' if answered else 'asked for, without an answer'}")


FAULTS: tuple[Fault, ...] = (
    kill_a_worker,
    freeze_a_worker,
    drain_a_worker,
    kill_a_dispatcher,
    freeze_a_dispatcher,
    kill_the_client,
    break_off_a_submission,
    flush_redis,
    take_redis_away,
    take_sql_away,
    take_s3_away,
    freeze_s3,
    slow_s3_down,
    cut_s3_off,
    cancel_a_batch,
    pause_a_batch,
    ask_urgently,
)

_OF_ITS_OWN = (break_off_a_submission, take_sql_away)
"""Faults that never overlap others.

`break_off_a_submission` needs all services to get halfway; `take_sql_away` would block the test process itself.
"""


def strokes(rng: random.Random) -> Iterator[tuple[Fault, ...]]:
    """Draw every fault once in random order, then again without end; some faults come in overlapping pairs."""
    while True:
        left = rng.sample(FAULTS, len(FAULTS))
        while left:
            first = left.pop()
            together = [first]
            if first not in _OF_ITS_OWN and left and left[-1] not in _OF_ITS_OWN and rng.random() < 0.4:
                together.append(left.pop())
            yield tuple(together)


def strike(farm: ChaosFarm, faults: tuple[Fault, ...], rng: random.Random) -> None:
    """Inject these faults together, wait for the longest, and undo them."""
    with ExitStack() as undo:
        struck = [undo.enter_context(fault(farm, rng)) for fault in faults]
        seconds = max(each.seconds for each in struck)
        lasting = f", for {seconds:.1f} s" if seconds else ""
        farm.say("; ".join(each.what for each in struck) + lasting)
        farm.hold(seconds)

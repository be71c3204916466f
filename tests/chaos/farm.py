"""A whole farm of real processes: each can be hit by a fault, and is restarted when it dies, as by a supervisor."""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import sqlalchemy as sa

from farm.client.farm import Farm
from farm.errors import ServiceUnavailable
from farm.jobs.conditions import ACCEPTED
from farm.jobs.database import Database
from farm.jobs.schema import BatchRow, JobRow, LeaderRow
from farm.jobs.states import ACTIVE, JobState
from farm.jobs.store import JobStore
from farm.local import parts
from farm.local.home import Home
from farm.local.parts import Part
from farm.local.process import PartProcess
from farm.objects.storage import Storage
from tests.chaos import moves
from tests.chaos.orders import Journal, Scale
from tests.chaos.postgres import Postgres
from tests.chaos.proxy import LOOPBACK, Proxy
from tests.integration.conftest import environment

ROOT = Path(__file__).parents[2]
WORKERS, SLOTS, DISPATCHERS = 3, 3, 2
LEASE_SECONDS = 3.0
SOON = 90.0
"""Timeout in seconds of a wait for something that should happen without further action."""
_POLL_SECONDS = 0.1
_RESTART_SECONDS = 0.3

_AWAY = 3
"""Exit status of a farm program that could not reach a service at startup."""


class Standing:
    """One process of the farm, restarted when it dies."""

    def __init__(self, part: Part, home: Home, *, to_its_end: bool = False) -> None:
        self.part = part
        self.done = False
        """Whether a process started with `to_its_end` has exited with status 0."""
        self._to_its_end = to_its_end
        self.name = part.name
        self.deaths: list[str] = []
        """Unexpected exits: those that no fault caused."""
        self.starts = 0
        self._home = home
        self._wanted = False
        self._awaited: set[int] = set()
        self._process: PartProcess | None = None
        self._ended_at = 0.0

    @property
    def running(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.ended() is None

    @property
    def pid(self) -> int | None:
        """Id of the current process, or of the one that has just ended."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start it, and from now on restart it whenever it ends."""
        self._wanted = True
        self._awaited = set()
        self._process = self.part.start(self._home)
        self.starts += 1

    def answers(self) -> bool:
        """Whether it is ready for use."""
        return self._process is not None and self.running and self.part.answers(self._process)

    def kill(self) -> None:
        """Send SIGKILL; it is restarted."""
        self.send(signal.SIGKILL, -signal.SIGKILL)

    def drain(self) -> None:
        """Send SIGTERM; it is restarted."""
        self.send(signal.SIGTERM, 0, -signal.SIGTERM)

    def send(self, number: signal.Signals, *statuses: int) -> None:
        """Send a signal. The given exit statuses then count as expected."""
        if self._process is not None and self._process.ended() is None:
            self._awaited.update(statuses)
            os.kill(self._process.pid, number)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Freeze it with SIGSTOP until the block ends."""
        frozen = self._process
        self.send(signal.SIGSTOP)
        try:
            yield
        finally:
            if frozen is self._process:
                self.send(signal.SIGCONT)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Kill it, and restart it when the block ends."""
        self._wanted = False
        self.kill()
        try:
            yield
        finally:
            self._clear()
            self.start()

    def leave(self) -> None:
        """Stop restarting it."""
        self._wanted = False

    def tend(self) -> None:
        """Record its exit if it has ended, and restart it after `_RESTART_SECONDS`."""
        if self._process is not None and (status := self._process.ended()) is not None:
            if status == 0 and self._to_its_end:
                self.done, self._wanted = True, False
            elif status not in self._awaited | {_AWAY}:
                said = "\n    ".join(self._process.last_lines(15))
                self.deaths.append(f"{self.name} ended by itself, exit {status}:\n    {said}")
            self._clear()
            self._ended_at = time.monotonic()
        if self._process is None and self._wanted and time.monotonic() - self._ended_at > _RESTART_SECONDS:
            self.start()

    def end(self) -> None:
        """Kill it if it still runs, and stop restarting it."""
        self._wanted = False
        self._clear()

    def _clear(self) -> None:
        if self._process is not None:
            self._process.clear()
            self._process = None


class OneMachine:
    """Placement of a farm's programs: all on this machine, on the loopback interface."""

    address = LOOPBACK
    """Address on which the servers listen."""
    remote = False
    """Whether workers, dispatchers and clients connect over a network."""

    def prefix(self, _name: str) -> tuple[str, ...]:
        """Arguments to put before the command of the program with this name."""
        return ()


class ChaosFarm:
    """Valkey, SeaweedFS behind a proxy, SQLite or PostgreSQL, two dispatchers, three workers, a client.

    With `small`: one dispatcher, one worker, and no client.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        seed: int,
        scale: Scale,
        *,
        loud: bool = False,
        small: bool = False,
        lease_seconds: float = LEASE_SECONDS,
        place: OneMachine | None = None,
        more_models: str = "",
    ) -> None:
        self.kind, self.seed, self.scale, self._small = kind, seed, scale, small
        self._lease_seconds = lease_seconds
        self._place = place or OneMachine()
        self._models = ",".join(filter(None, (f"tiny=null:?seconds_per_step={scale.seconds_per_step}", more_models)))
        self._loud = loud
        self.home = Home(folder / "home")
        self.journal = Journal(folder / "journal.jsonl")
        self._enough = folder / "enough"
        self._undo = ExitStack()
        self._everybody: list[Standing] = []
        self.began = time.monotonic()
        self.told: list[str] = []

    def __enter__(self) -> Self:
        try:
            self._start_servers()
            self._start_users()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()
        shutil.rmtree(self.home.path / "s3", ignore_errors=True)

    # --- startup --------------------------------------------------------------------------------------------

    def _start_servers(self) -> None:
        parts.require(worker=True, flower=False)
        self.home.take()
        self._undo.callback(self.home.release)
        access = replace(self.home.access(), host=self._place.address)
        direct = self.home.settings(access)
        self.postgres: Postgres | None = None
        database_url = direct.database_url
        if self.kind == "postgresql":
            self.postgres = Postgres(self._place.address if self._place.remote else None)
            self._undo.callback(self.postgres.close)
            database_url = self.postgres.url
        self.proxy = Proxy(access.ports["s3"], self._place.address)
        self._undo.callback(self.proxy.close)
        self.settings = direct.model_copy(
            update={
                "database_url": database_url,
                "s3_endpoint_url": f"http://{self._place.address}:{self.proxy.port}",
                "lease_seconds": self._lease_seconds,
                "beat_seconds": self._lease_seconds / 5,
                "forward_sizes": self.home.path / "forwards.json",
                "window": 16,
            }
        )
        self.db = Database(database_url)
        self._undo.callback(self.db.close)
        self.db.migrate()
        moves.install(self.db)
        self.storage = Storage(direct)
        self._undo.callback(self.storage.close)
        self.store = JobStore.over(self.db, self.settings)
        self.redis = self._stand(parts.valkey(self.home, access, direct))
        self.s3 = self._stand(parts.seaweed(self.home, access, direct))
        for server in (self.redis, self.s3):
            server.start()
        self.wait_until(lambda: self.redis.answers() and self.s3.answers(), "Redis and S3 answer")

    def _start_users(self) -> None:
        dispatchers, workers = (1, 1) if self._small else (DISPATCHERS, WORKERS)
        self.dispatchers = [self._stand(self._program(f"d{n}", "farm", "dispatcher")) for n in range(dispatchers)]
        self.workers = [self._stand(self._program(f"w{n}", "workers", "--name", f"w{n}")) for n in range(workers)]
        client = self._client("--scale", self.scale.dumps(), "--enough", str(self._enough))
        self.client = self._stand(client, to_its_end=True)
        for user in (*self.dispatchers, *self.workers, *(() if self._small else (self.client,))):
            user.start()
        self.farm = Farm(self.settings)
        self._undo.callback(self.farm.close)
        self.wait_until(
            lambda: sum(worker.alive for worker in self.store.workers.all()) == workers, f"{workers} workers are there"
        )

    def _stand(self, part: Part, *, to_its_end: bool = False) -> Standing:
        standing = Standing(part, self.home, to_its_end=to_its_end)
        self._everybody.append(standing)
        self._undo.callback(standing.end)
        return standing

    def breaking_off(self, name: str) -> Standing:
        """A client that stops in the middle of a large submission. The caller starts it."""
        return self._stand(self._client("--break-off", name, name=name))

    def _client(self, *arguments: str, name: str = "client") -> Part:
        journal = ("--journal", str(self.home.path.parent / "journal.jsonl"), "--seed", str(self.seed))
        return self._program(name, "tests.chaos.client", *journal, *arguments)

    def _program(self, name: str, module: str, *arguments: str) -> Part:
        env = environment(
            self.settings,
            FARM_MODELS=self._models,
            FARM_SLOTS=SLOTS,
            FARM_WINDOW=self.settings.window,
            FARM_CHECKPOINT_STEPS=10,
            FARM_DRAIN_SECONDS=1.5,
            # High limits: every job must succeed, however many of its workers die.
            FARM_MAX_LOST_LEASES=50,
            FARM_MAX_TRIES=50,
            FARM_RETRY_SECONDS=0.2,
            FARM_RETRY_MAX_SECONDS=1.0,
            PYTHONUNBUFFERED=1,
        )
        return Part(
            name=name,
            shown=name,
            address="",
            command=(*self._place.prefix(name), sys.executable, "-m", module, *arguments),
            env=env,
            cwd=ROOT,
            answers=lambda _process: True,
        )

    # --- operation ------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Record an event of the run with its time."""
        self.told.append(f"{time.monotonic() - self.began:7.1f} s  {text}")
        if self._loud:
            print(self.told[-1], flush=True)

    def tend(self) -> None:
        """Restart the processes that have died."""
        for one in self._everybody:
            one.tend()

    def hold(self, seconds: float) -> None:
        """Wait for the duration of a fault, restarting processes that die meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.tend()
            time.sleep(_POLL_SECONDS)

    def wait_until(self, true: Callable[[], bool], what: str, seconds: float = SOON) -> None:
        """Wait until a condition holds, restarting processes meanwhile; fails with the description on timeout."""
        assert self.comes_true(true, seconds), f"in {seconds:.0f} s: not {what}"

    def comes_true(self, true: Callable[[], bool], seconds: float) -> bool:
        """Whether a condition holds before the timeout. While a service is away it counts as false."""
        deadline = time.monotonic() + seconds
        while True:
            self.tend()
            try:
                if true():
                    return True
            except ServiceUnavailable:
                pass
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)

    def counts(self) -> dict[JobState, int]:
        """Number of jobs of accepted batches in each state."""
        with self.db.read() as session:
            found = session.execute(
                sa.select(JobRow.state, sa.func.count()).join(BatchRow).where(ACCEPTED).group_by(JobRow.state)
            ).all()
        return dict.fromkeys(JobState, 0) | {JobState(state): count for state, count in found}

    def ended(self) -> int:
        """Number of jobs in a terminal state."""
        return sum(count for state, count in self.counts().items() if state.terminal)

    def busy(self) -> bool:
        """Whether a job is running."""
        return self.counts()[JobState.RUNNING] > 0

    def some(self, rng: random.Random, of: list[Standing]) -> Standing:
        """A random running process; if none runs, any of them."""
        return rng.choice([one for one in of if one.running] or of)

    def leader(self, rng: random.Random) -> Standing:
        """The leading dispatcher; any dispatcher if the leader is unknown."""
        any_one = self.some(rng, self.dispatchers)
        with suppress(ServiceUnavailable), self.db.read() as session:
            for holder in session.scalars(sa.select(LeaderRow.holder)):
                return next((one for one in self.dispatchers if f":{one.pid}:" in holder), any_one)
        return any_one

    # --- shutdown -------------------------------------------------------------------------------------------

    def settle(self, seconds: float) -> None:
        """Wait until the client has finished and every submitted job has ended."""
        self._enough.touch()
        self.wait_until(lambda: self.client.done, "the client has submitted all its batches", seconds)
        self.wait_until(lambda: not any(self.counts()[state] for state in ACTIVE), "every job has ended", seconds)

    def stop_users(self) -> None:
        """Stop workers and dispatchers with SIGTERM; the servers keep running."""
        users = [*self.workers, *self.dispatchers]
        for user in users:
            user.leave()
            user.drain()
        self.wait_until(lambda: not any(user.running for user in users), "workers and dispatchers stop on SIGTERM", 40)

    def deaths(self) -> list[str]:
        """Unexpected exits of processes: those that no fault caused."""
        return [death for one in self._everybody for death in one.deaths]

    def logs(self) -> dict[str, str]:
        """Log of each program of the farm, by name."""
        servers = (self.redis.name, self.s3.name)
        return {
            path.stem: path.read_text(errors="replace")
            for path in sorted(self.home.logs.glob("*.log"))
            if path.stem not in servers
        }

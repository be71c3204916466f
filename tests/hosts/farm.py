"""The farm of the chaos suite on five hosts, and the commands that users run there."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from farm.jobs.schema import AttemptRow, JobRow
from farm.jobs.states import JobState, Outcome
from tests.chaos.farm import ROOT, ChaosFarm, OneMachine, Standing
from tests.chaos.orders import Order, Scale, order
from tests.chaos.test_chaos import told
from tests.hosts.network import Network
from tests.integration.conftest import environment

SERVICES, DESK = "services", "desk"
"""The host of SQL, Redis, S3 and a dispatcher; and the host of the client and a second dispatcher."""
NODES = ("node-0", "node-1", "node-2")
"""Hosts of the workers."""
SEED = 1
SCALE = Scale(jobs=60, batch=(3, 12), steps=(15, 50), seconds_per_step=0.03, backlog=24)
_PROGRAMS = {"d0": SERVICES, "d1": DESK, "client": DESK, "w0": NODES[0], "w1": NODES[1], "w2": NODES[2]}


class Hosts(OneMachine):
    """Placement of a farm's programs: servers on one host, each worker on its own, the client on another."""

    remote = True

    def __init__(self, network: Network) -> None:
        self._network = network
        self.address = network.addresses[SERVICES]
        self.where = dict(_PROGRAMS)
        """Host of each program, by name."""

    def prefix(self, name: str) -> tuple[str, ...]:
        """Arguments to put before the command of the program with this name, to run it on its host."""
        return self._network.prefix(self.where[name])


class HostsFarm(ChaosFarm):
    """A farm on several hosts; the test process runs on the services' host."""

    def __init__(self, network: Network, folder: Path, **more: Any) -> None:
        self.network, self._hosts = network, Hosts(network)
        super().__init__(folder, "postgresql", SEED, SCALE, loud=True, place=self._hosts, **more)

    def host(self, one: Standing) -> str:
        """The host of a process."""
        return self._hosts.where[one.name]

    def stand_at(self, host: str, name: str, module: str, *arguments: str) -> Standing:
        """Add a program on a host; the caller starts it."""
        self._hosts.where[name] = host
        return self._stand(self._program(name, module, *arguments))

    def worker_name(self, one: Standing) -> str:
        """The worker's name in the farm."""
        return f"{one.name}@{self.host(one)}"

    def holds(self, one: Standing) -> dict[str, int]:
        """Ids of the jobs that are running on a worker according to SQL, with their attempts."""
        held = sa.select(JobRow.id, JobRow.attempt).where(
            JobRow.worker == self.worker_name(one), JobRow.state == JobState.RUNNING
        )
        with self.db.read() as session:
            return {row.id: row.attempt for row in session.execute(held)}

    def attempts(self, of: set[str]) -> list[AttemptRow]:
        """Ended attempts of these jobs."""
        with self.db.read() as session:
            found = session.scalars(sa.select(AttemptRow).where(AttemptRow.job_id.in_(of))).all()
            session.expunge_all()
        return list(found)

    def run_at(
        self, host: str, *command: str, cwd: Path = ROOT, seconds: float = 120, **env: object
    ) -> subprocess.CompletedProcess[str]:
        """Run `python -m COMMAND` on a host and wait for it."""
        return subprocess.run(
            [*self.network.prefix(host), sys.executable, "-m", *command],
            cwd=cwd,
            env=environment(self.settings, **env),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def at_desk(self, *arguments: str) -> str:
        """Run `farm ARGUMENTS` on the client's host, which must succeed; returns its output."""
        ended = self.run_at(DESK, "farm", *arguments)
        assert ended.returncode == 0, (arguments, ended.stdout, ended.stderr)
        return ended.stdout

    def hand_in_at_desk(self, name: str) -> Order:
        """Submit an order from a file with the command line."""
        wanted = order(self.seed, name, self.scale)
        lines = self.home.path.parent / f"{name}.jsonl"
        lines.write_text("".join(spec.model_dump_json(exclude_defaults=True) + "\n" for spec in wanted.specs))
        self.journal.write("asks", name, priority=wanted.priority)
        said = self.at_desk("submit", str(lines), "--name", name, "--priority", str(wanted.priority), "--json")
        self.journal.write("has", name, batch=json.loads(said)["batch"], jobs=len(wanted.specs))
        return wanted

    def ended_by(self, one: Standing, outcome: Outcome | None = None) -> int:
        """Number of ended attempts of a worker, or of those with this outcome."""
        mine = sa.select(sa.func.count()).where(AttemptRow.worker == self.worker_name(one))
        if outcome is not None:
            mine = mine.where(AttemptRow.outcome == outcome)
        with self.db.read() as session:
            return session.scalars(mine).one()

    def hold_until(self, true: Callable[[], bool], what: str, seconds: float) -> float:
        """Wait until a condition holds; returns the seconds it took."""
        began = time.monotonic()
        self.wait_until(true, what, seconds)
        return time.monotonic() - began


@contextmanager
def hosts_farm(folder: Path, **more: Any) -> Iterator[HostsFarm]:
    """A running farm on its own hosts; both are removed at the end."""
    with ExitStack() as undo:
        proxies = undo.enter_context(pytest.MonkeyPatch.context())
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            proxies.delenv(name)  # the proxies can't be reached from the hosts
        network = undo.enter_context(Network((SERVICES, *NODES, DESK)))
        undo.enter_context(network.on(SERVICES))
        farm = undo.enter_context(HostsFarm(network, folder, **more))
        undo.enter_context(told(farm, "make hosts-test"))
        farm.say("up")
        yield farm

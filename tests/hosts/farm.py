"""The farm of the chaos suite on five hosts, and what a person does at them."""

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
"""The host of SQL, Redis, S3 and a dispatcher; and the client's, where another dispatcher stands by."""
NODES = ("node-0", "node-1", "node-2")
"""The workers' hosts."""
SEED = 1
SCALE = Scale(jobs=60, batch=(3, 12), steps=(15, 50), seconds_per_step=0.03, backlog=24)
_PROGRAMS = {"d0": SERVICES, "d1": DESK, "client": DESK, "w0": NODES[0], "w1": NODES[1], "w2": NODES[2]}


class Hosts(OneMachine):
    """Where the parts of a farm run: servers on one host, each worker on one of its own, the client on another."""

    remote = True

    def __init__(self, network: Network) -> None:
        self._network = network
        self.address = network.addresses[SERVICES]
        self.where = dict(_PROGRAMS)
        """The host of each program."""

    def prefix(self, name: str) -> tuple[str, ...]:
        """What takes a command to the host of the program of that name."""
        return self._network.prefix(self.where[name])


class HostsFarm(ChaosFarm):
    """A farm on many hosts; this process looks at it from the services' host."""

    def __init__(self, network: Network, folder: Path, **more: Any) -> None:
        self.network, self._hosts = network, Hosts(network)
        super().__init__(folder, "postgresql", SEED, SCALE, loud=True, place=self._hosts, **more)

    def host(self, one: Standing) -> str:
        """Where it runs."""
        return self._hosts.where[one.name]

    def stand_at(self, host: str, name: str, module: str, *arguments: str) -> Standing:
        """One program more, on that host."""
        self._hosts.where[name] = host
        return self._stand(self._program(name, module, *arguments))

    def worker_name(self, one: Standing) -> str:
        """What the farm calls a worker."""
        return f"{one.name}@{self.host(one)}"

    def holds(self, one: Standing) -> dict[str, int]:
        """The jobs that a worker has by what SQL says, each with its attempt."""
        held = sa.select(JobRow.id, JobRow.attempt).where(
            JobRow.worker == self.worker_name(one), JobRow.state == JobState.RUNNING
        )
        with self.db.read() as session:
            return {row.id: row.attempt for row in session.execute(held)}

    def attempts(self, of: set[str]) -> list[AttemptRow]:
        """How the attempts of these jobs have ended, so far."""
        with self.db.read() as session:
            found = session.scalars(sa.select(AttemptRow).where(AttemptRow.job_id.in_(of))).all()
            session.expunge_all()
        return list(found)

    def run_at(
        self, host: str, *command: str, cwd: Path = ROOT, seconds: float = 120, **env: object
    ) -> subprocess.CompletedProcess[str]:
        """What `python -m COMMAND` says on a host, to somebody who waits for it."""
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
        """What `farm ARGUMENTS` says at the client's host; fails unless all is well."""
        ended = self.run_at(DESK, "farm", *arguments)
        assert ended.returncode == 0, (arguments, ended.stdout, ended.stderr)
        return ended.stdout

    def hand_in_at_desk(self, name: str) -> Order:
        """Submit an order by the command line, from a file."""
        wanted = order(self.seed, name, self.scale)
        lines = self.home.path.parent / f"{name}.jsonl"
        lines.write_text("".join(spec.model_dump_json(exclude_defaults=True) + "\n" for spec in wanted.specs))
        self.journal.write("asks", name, priority=wanted.priority)
        said = self.at_desk("submit", str(lines), "--name", name, "--priority", str(wanted.priority), "--json")
        self.journal.write("has", name, batch=json.loads(said)["batch"], jobs=len(wanted.specs))
        return wanted

    def ended_by(self, one: Standing, outcome: Outcome | None = None) -> int:
        """How many attempts of a worker have ended, so far; or ended so."""
        mine = sa.select(sa.func.count()).where(AttemptRow.worker == self.worker_name(one))
        if outcome is not None:
            mine = mine.where(AttemptRow.outcome == outcome)
        with self.db.read() as session:
            return session.scalars(mine).one()

    def hold_until(self, true: Callable[[], bool], what: str, seconds: float) -> float:
        """Wait until something has come true; how long it took."""
        began = time.monotonic()
        self.wait_until(true, what, seconds)
        return time.monotonic() - began


@contextmanager
def hosts_farm(folder: Path, **more: Any) -> Iterator[HostsFarm]:
    """A farm that works, on hosts of its own; nothing of both is left."""
    with ExitStack() as undo:
        proxies = undo.enter_context(pytest.MonkeyPatch.context())
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            proxies.delenv(name)  # they are of the machine's own network
        network = undo.enter_context(Network((SERVICES, *NODES, DESK)))
        undo.enter_context(network.on(SERVICES))
        farm = undo.enter_context(HostsFarm(network, folder, **more))
        undo.enter_context(told(farm, "make hosts-test"))
        farm.say("up")
        yield farm

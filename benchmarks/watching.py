"""What it costs to be watched: `python -m benchmarks.watching`, one table at the end.

The same farm renders the same jobs by turns with nobody looking and with everything that can look: metrics of the
dispatcher and the worker fetched every second, Flower with its bars and rows, and `farm watch` on a terminal. All of it
shares the cores with the farm. Once the small model is rendered on the CPU; once forwards only take their time, as on a
GPU, where the cores are there for all else: there it also shows how much of the cores it takes.
"""

import argparse
import json
import logging
import os
import pty
import random
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import redis
import sqlalchemy as sa

from benchmarks.rows import Row
from benchmarks.table import table, where
from farm.client import Farm
from farm.db import Database
from farm.environment import variables
from farm.local import LocalFarm
from farm.schema import JobRow
from farm.settings import Settings

log = logging.getLogger("benchmarks")

GOAL = 2.0
"""Per cent of the throughput."""
SLOTS = 16
_WARM = 24
_READY_SECONDS = 120.0


@dataclass(frozen=True)
class Case:
    """One kind of work."""

    what: str
    models: str
    steps: int
    jobs: int
    spares_cores: bool = False


CASES = (
    Case("the small model on the CPU", "tiny", 20, 240),
    Case("forwards of 40 ms that leave the CPU alone, as on a GPU", "tiny=null:?seconds_per_step=0.04", 20, 400, True),
)


@dataclass(frozen=True)
class Round:
    """What one farm did."""

    rate: float
    """Jobs a second."""
    cores: float
    """How many cores were busy, for all of its processes and whoever looks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; 1 if the goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watching", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one pair of rounds, a tenth of the jobs")
    parser.add_argument("--rounds", type=int, default=8, help="pairs of rounds (8)")
    parser.add_argument("--only", type=int, nargs="+", choices=(1, 2), default=[1, 2], metavar="CASE")
    parser.add_argument("--json", type=Path, help="where to write the rows as JSON")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(relativeCreated)7d ms  %(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="farm-benchmark-") as place:
        servers = LocalFarm(Path(place) / "home", workers=0, dispatcher=False, flower=False)
        with servers:
            rounds = Rounds(servers.settings, Path(place), 10 if options.quick else 1)
            pairs = 1 if options.quick else options.rounds
            rows = [row for number in options.only for row in rounds.rows(number, CASES[number - 1], pairs)]
    command = shlex.join(["python", "-m", "benchmarks.watching", *(arguments or sys.argv[1:])])
    facts = [f"`{command}`", where()]
    print(table(rows, facts))
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "rows": [asdict(row) for row in rows]}, indent=1))
    return int(any(row.met is False for row in rows))


class Rounds:
    """Runs one farm after the other, each with a new database and an empty Redis."""

    def __init__(self, settings: Settings, place: Path, part: int) -> None:
        self._settings = settings.model_copy(update={"forward_sizes": place / "sizes.json"})
        self._place = place
        self._part = part
        self._started = 0

    def rows(self, number: int, case: Case, pairs: int) -> list[Row]:
        """What being watched costs: the middle one of pairs of rounds, in an order of chance, as machines drift."""
        chance = random.Random(0)
        self._round(case, watched=False, jobs=_WARM)  # measures the forwards, so that no round has to
        alone: list[Round] = []
        watched: list[Round] = []
        for _ in range(pairs):
            for looks in chance.sample((False, True), 2):
                one = self._round(case, watched=looks, jobs=case.jobs // self._part)
                (watched if looks else alone).append(one)
                shown = "watched" if looks else "alone"
                log.info("   %s: %.3f jobs/s, %.3f cores", shown, one.rate, one.cores)
        both = list(zip(watched, alone, strict=True))
        costs = [100 * (1 - one.rate / other.rate) for one, other in both]
        rows = [
            Row(
                number,
                f"cost of being watched, {case.what}",
                median(costs),
                " %",
                f"≤ {GOAL:g} %",
                median(costs) <= GOAL,
                (min(costs), max(costs)),
                f"{median(one.rate for one in watched):.2f} jobs/s watched",
                f"{median(one.rate for one in alone):.2f} jobs/s alone",
            )
        ]
        if case.spares_cores:
            there = os.cpu_count() or 1
            shares = [100 * (one.cores - other.cores) / there for one, other in both]
            rows.append(
                Row(
                    number,
                    f"what it takes of {there} cores then",
                    median(shares),
                    " %",
                    f"≤ {GOAL:g} %",
                    median(shares) <= GOAL,
                    (min(shares), max(shares)),
                    f"{median(one.cores for one in watched):.3f} cores watched",
                    f"{median(one.cores for one in alone):.3f} cores alone",
                )
            )
        return rows

    def _round(self, case: Case, *, watched: bool, jobs: int) -> Round:
        """Start a farm, render so many jobs, and end it; counted between the first that ends and the last."""
        settings = self._fresh()
        dispatcher = f"127.0.0.1:{_free_port()}"
        metrics: dict[str, Any] = {"FARM_METRICS_PORT": dispatcher.rpartition(":")[2]} if watched else {}
        worker: dict[str, Any] = {
            "FARM_MODELS": case.models,
            "FARM_SLOTS": SLOTS,
            **({"FARM_METRICS_PORT": 0} if watched else {}),
        }
        if not watched:
            worker["FARM_PROGRESS_SECONDS"] = metrics["FARM_PROGRESS_SECONDS"] = "none"
        with ExitStack() as stack:
            farm = stack.enter_context(Farm(settings))
            start = partial(self._process, settings)
            stack.enter_context(start("farm", "dispatcher", **metrics))
            stack.enter_context(start("workers", "--name", "w1", **worker))
            _wait(lambda: any(one.alive for one in farm.workers()))
            if watched:
                stack.enter_context(self._watched(settings, dispatcher))
            farm.submit(["warm"] * _WARM, num_inference_steps=2, reuse=False).wait()
            batch = farm.submit((f"picture {n}" for n in range(jobs)), num_inference_steps=case.steps, reuse=False)
            began, used = time.monotonic(), _cpu_seconds()
            batch.wait(timeout=600)
            return Round(_ended_rate(settings, batch.id), (_cpu_seconds() - used) / (time.monotonic() - began))

    @contextmanager
    def _watched(self, settings: Settings, dispatcher: str) -> Iterator[None]:
        """Everything that looks at a farm, at once."""
        login, port = "farm:benchmark", _free_port()
        flower: dict[str, Any] = {
            "FLOWER_ADDRESS": "127.0.0.1",
            "FLOWER_PORT": port,
            "FLOWER_BASIC_AUTH": login,
            "FLOWER_DB": self._place / f"flower-{self._started}",
        }
        with (
            self._process(settings, "farm.flower", **flower),
            self._process(settings, "farm", "watch", terminal=True, COLUMNS=120, LINES=40, TERM="xterm"),
            _scraped(dispatcher),
        ):
            _wait(partial(_listens, port))
            yield

    def _fresh(self) -> Settings:
        with redis.Redis.from_url(self._settings.broker_url) as client:
            client.flushall()
        self._started += 1
        settings = self._settings.model_copy(
            update={"database_url": f"sqlite:///{self._place / f'farm-{self._started}.db'}"}
        )
        database = Database(settings.database_url)
        database.migrate()
        database.close()
        return settings

    @contextmanager
    def _process(
        self, settings: Settings, *module: str, terminal: bool = False, **env: object
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A Python module in a process of its own, which finds this farm; ended at the end.

        On a terminal whose other end is read and thrown away, if it is to have one.
        """
        known = {name: value for name, value in os.environ.items() if not name.startswith(("FARM_", "FLOWER_"))}
        found = {**variables(settings), "FARM_FORWARD_SIZES": settings.forward_sizes, **env}
        self._started += 1
        with ExitStack() as stack:
            output = stack.enter_context((self._place / f"{self._started}.log").open("wb"))
            stream: int = output.fileno()
            if terminal:
                ours, stream = pty.openpty()
                stack.callback(os.close, ours)
                threading.Thread(target=_drain, args=(ours,), daemon=True).start()
            process = subprocess.Popen(
                [sys.executable, "-m", *module],
                env={**known, **{name: str(value) for name, value in found.items()}},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            )
            if terminal:
                os.close(stream)
            try:
                yield process
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(module)} ended: {process.returncode}")
            finally:
                process.kill()
                process.wait()


@contextmanager
def _scraped(dispatcher: str) -> Iterator[None]:
    """Fetch what the dispatcher and every worker that it names tell, once a second."""
    stop, bytes_read = threading.Event(), [0]

    def scrape() -> None:
        while not stop.wait(1.0):
            targets = json.loads(_read(f"http://{dispatcher}/workers"))
            where = [dispatcher, *(address for one in targets for address in one["targets"])]
            bytes_read[0] += sum(len(_read(f"http://{address}/metrics")) for address in where)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if not bytes_read[0]:
        raise RuntimeError("no metrics were read")


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        content: bytes = answer.read()
        return content


def _drain(terminal: int) -> None:
    try:
        while os.read(terminal, 65536):
            pass
    except OSError:  # its other end is closed
        pass


def _cpu_seconds() -> float:
    """What all processes that run here have computed so far; whoever reads the metrics is this one, and not counted."""
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return sum(one.user + one.system for one in times)


def _ended_rate(settings: Settings, batch_id: str) -> float:
    database = Database(settings.database_url)
    with database.read() as session:
        ends = session.scalars(
            sa.select(JobRow.finished_at).where(JobRow.batch_id == batch_id, JobRow.state == "succeeded")
        ).all()
    database.close()
    times = sorted(end.timestamp() for end in ends if end is not None)
    return (len(times) - 1) / (times[-1] - times[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {_READY_SECONDS:.0f} s in vain")
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())

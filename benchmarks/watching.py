"""Measures the cost of monitoring: `python -m benchmarks.watching` prints a table at the end.

Two equal farms render the same jobs on the same cores, in turns of some seconds: while one runs, all processes of the
other are stopped. One is not monitored. The other has everything at once: metrics of dispatcher and worker are fetched
as often as by the Prometheus configuration that ships, Flower shows its progress bars and rows, and `farm watch` runs
on a terminal, all on the same cores. Turns are short, because the speed of machines drifts; adjacent turns are
compared. One case renders the small model on the CPU. In the other, forwards only wait, as on a GPU, where the cores
are free: it also measures how much of the cores monitoring takes.
"""

import argparse
import json
import logging
import os
import pty
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import redis

from benchmarks.rows import Row
from benchmarks.table import publish
from benchmarks.waiting import wait_until
from farm.cli.environment import variables
from farm.client.farm import Farm
from farm.jobs.database import Database
from farm.local import LocalFarm
from farm.settings import Settings

log = logging.getLogger("benchmarks")

GOAL = 2.0
"""In per cent of the throughput."""
SLOTS = 16
_TURN_SECONDS, _SETTLE_SECONDS = 2.5, 1.0
_MOST_JOBS_A_SECOND = 40
_SCRAPE_SECONDS = 15.0
"""The scrape interval of infra/prometheus/prometheus.yml, counted while the farm runs."""


@dataclass(frozen=True)
class Case:
    """One kind of work."""

    what: str
    models: str
    spares_cores: bool = False


CASES = (
    Case("the small model on the CPU", "tiny"),
    Case("forwards of 40 ms that leave the CPU alone, as on a GPU", "tiny=null:?seconds_per_step=0.04", True),
)


@dataclass(frozen=True)
class Turn:
    """The results of one farm while the other was stopped."""

    rate: float
    """Rows of forwards per second: a job has one or two per step."""
    cores: float
    """Busy cores of all its processes, the services and the monitors."""
    others: float
    """Busy cores without the worker."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; 1 if the goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watching", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="Measure two pairs of short turns.")
    parser.add_argument("--pairs", type=int, default=80, help="Number of pairs of turns (default: %(default)s).")
    parser.add_argument(
        "--only",
        type=int,
        nargs="+",
        choices=(1, 2),
        default=[1, 2],
        metavar="CASE",
        help="Cases to measure: 1, 2 or both; both if omitted.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="File to write the rows to as JSON.")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(relativeCreated)7d ms  %(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    pairs, seconds = (2, 2.0) if options.quick else (options.pairs, _TURN_SECONDS)
    with tempfile.TemporaryDirectory(prefix="farm-benchmark-") as place:
        servers = LocalFarm(Path(place) / "home", workers=0, dispatcher=False, flower=False)
        with servers:
            turns = Turns(servers.settings, Path(place), seconds)
            rows = [row for number in options.only for row in turns.rows(number, CASES[number - 1], pairs)]
    return publish("benchmarks.watching", arguments, rows, options.json)


class Side:
    """A farm that renders an endless batch and can be stopped as a whole."""

    def __init__(self, metrics: str, worker: int, processes: Sequence[int], gate: threading.Lock) -> None:
        self._metrics = metrics
        self._renders = psutil.Process(worker)
        self._processes = [psutil.Process(process) for process in processes]
        self._gate = gate
        self._stopped = False

    def turn(self, seconds: float) -> Turn:
        """Let it run for `seconds`, then stop it."""
        self.resume()
        time.sleep(min(_SETTLE_SECONDS, seconds / 2))
        rows, mine, used, began = self._rows(), _cpu_seconds([self._renders]), _cpu_seconds(), time.monotonic()
        time.sleep(seconds)
        rows, took = self._rows() - rows, time.monotonic() - began
        mine, used = _cpu_seconds([self._renders]) - mine, _cpu_seconds() - used
        self._gate.acquire()  # no monitor is waiting for an answer now
        self._signal(signal.SIGSTOP)
        self._stopped = True
        return Turn(rows / took, used / took, (used - mine) / took)

    def resume(self) -> None:
        """Resume its processes."""
        if self._stopped:
            self._signal(signal.SIGCONT)
            self._gate.release()
        self._stopped = False

    def _rows(self) -> float:
        found = re.search(
            rb"^farm_worker_forward_rows_sum{.*} (\S+)$", _read(f"http://{self._metrics}/metrics"), re.MULTILINE
        )
        return float(found[1]) if found else 0.0

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)


class Turns:
    """Starts two farms per case, and lets them run in turns."""

    def __init__(self, settings: Settings, place: Path, seconds: float) -> None:
        # A stopped farm must not look like a dead one.
        update = {"forward_sizes": place / "sizes.json", "lease_seconds": 3600.0}
        self._settings = settings.model_copy(update=update)
        self._place = place
        self._seconds = seconds
        self._started = 0

    def rows(self, number: int, case: Case, pairs: int) -> list[Row]:
        """The cost of monitoring: the median of pairs of turns in random order."""
        chance = random.Random(0)
        turns: dict[bool, list[Turn]] = {False: [], True: []}
        with ExitStack() as stack:
            with redis.Redis.from_url(self._settings.broker_url) as client:
                client.flushall()
            sides = {}
            for looks in (False, True):
                sides[looks] = stack.enter_context(self._side(case, pairs, watched=looks))
                sides[looks].turn(self._seconds)  # fill all slots
            for pair in range(pairs):
                for looks in chance.sample((False, True), 2):
                    turns[looks].append(sides[looks].turn(self._seconds))
                log.info("   %d: watched %s, alone %s", pair + 1, turns[True][-1], turns[False][-1])
        both = list(zip(turns[True], turns[False], strict=True))
        costs = [100 * (1 - watched.rate / alone.rate) for watched, alone in both]
        there = os.cpu_count() or 1

        def told(name: str, unit: str) -> list[str]:
            return [f"{median(getattr(turn, name) for turn in turns[looks]):.3f} {unit}" for looks in (True, False)]

        def shares(name: str) -> list[float]:
            return [100 * (getattr(watched, name) - getattr(alone, name)) / there for watched, alone in both]

        rows = [_row(number, f"cost of being watched, {case.what}", costs, told("rate", "rows/s"))]
        if case.spares_cores:
            rows.append(_row(number, f"what it takes of {there} cores then", shares("cores"), told("cores", "cores")))
        else:
            what = f"what the worker has less of {there} cores then"
            rows.append(_row(number, what, shares("others"), told("others", "cores")))
        return rows

    @contextmanager
    def _side(self, case: Case, pairs: int, *, watched: bool) -> Iterator[Side]:
        """Start a farm with more jobs than it can render, and stop it."""
        settings = self._fresh(int(watched))
        dispatcher, worker = (f"127.0.0.1:{_free_port()}" for _ in range(2))
        quiet: dict[str, Any] = {} if watched else {"FARM_PROGRESS_SECONDS": "none"}
        metrics: dict[str, Any] = {"FARM_METRICS_PORT": dispatcher.rpartition(":")[2]} if watched else {}
        # The worker's metrics port is open on both sides, to read its counters at the start and the end of a turn.
        given: dict[str, Any] = {
            "FARM_MODELS": case.models,
            "FARM_SLOTS": SLOTS,
            "FARM_METRICS_PORT": worker.rpartition(":")[2],
        }
        jobs = int(_MOST_JOBS_A_SECOND * (pairs + 2) * (self._seconds + _SETTLE_SECONDS))
        gate = threading.Lock()
        with ExitStack() as stack:
            farm = stack.enter_context(Farm(settings))
            start = partial(self._process, settings)
            processes = [
                stack.enter_context(start("farm", "dispatcher", **metrics, **quiet)),
                stack.enter_context(start("workers", "--name", "w1", **given, **quiet)),
            ]
            wait_until(lambda: any(one.alive for one in farm.workers()))
            if watched:
                processes += stack.enter_context(self._watched(settings, dispatcher, gate))
            # Different lengths: else all jobs end together, and the cores wait for the next ones.
            steps = random.Random(0)
            specs = ({"prompt": f"picture {n}", "num_inference_steps": steps.randint(10, 30)} for n in range(jobs))
            farm.submit(specs, reuse=False)
            side = Side(worker, processes[1].pid, [process.pid for process in processes], gate)
            yield side
            side.resume()

    @contextmanager
    def _watched(
        self, settings: Settings, dispatcher: str, gate: threading.Lock
    ) -> Iterator[list[subprocess.Popen[bytes]]]:
        """All monitors of a farm."""
        login, port = "farm:benchmark", _free_port()
        flower: dict[str, Any] = {
            "FLOWER_ADDRESS": "127.0.0.1",
            "FLOWER_PORT": port,
            "FLOWER_BASIC_AUTH": login,
            "FLOWER_DB": self._place / f"flower-{self._started}",
        }
        drawn = threading.Event()
        with (
            self._process(settings, "farm.queue.flower", **flower) as looking,
            self._process(settings, "farm", "watch", terminal=drawn, COLUMNS=120, LINES=40, TERM="xterm") as watching,
            _scraped(dispatcher, gate),
        ):
            wait_until(lambda: _listens(port) and drawn.is_set())
            yield [looking, watching]

    def _fresh(self, number: int) -> Settings:
        self._started += 1
        update = {
            "database_url": f"sqlite:///{self._place / f'farm-{self._started}.db'}",
            "broker_url": self._settings.broker_url.rpartition("/")[0] + f"/{number}",
        }
        settings = self._settings.model_copy(update=update)
        database = Database(settings.database_url)
        database.migrate()
        database.close()
        return settings

    @contextmanager
    def _process(
        self, settings: Settings, *module: str, terminal: threading.Event | None = None, **env: object
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Run a Python module with this farm's settings in a process; end it at the end.

        With `terminal`, the process gets a terminal whose output is discarded; the event is set on the first output.
        """
        known = {name: value for name, value in os.environ.items() if not name.startswith(("FARM_", "FLOWER_"))}
        found = {**variables(settings), "FARM_FORWARD_SIZES": settings.forward_sizes, "FARM_STUCK_SECONDS": 3600, **env}
        self._started += 1
        with ExitStack() as stack:
            output = stack.enter_context((self._place / f"{self._started}.log").open("wb"))
            stream: int = output.fileno()
            if terminal is not None:
                ours, stream = pty.openpty()
                stack.callback(os.close, ours)
                threading.Thread(target=_drain, args=(ours, terminal), daemon=True).start()
            process = subprocess.Popen(
                [sys.executable, "-m", *module],
                env={**known, **{name: str(value) for name, value in found.items()}},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,  # when a shell ends, its process group gets SIGHUP if a member is stopped
            )
            if terminal is not None:
                os.close(stream)
            try:
                yield process
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(module)} ended: {process.returncode}")
            finally:
                process.kill()
                process.wait()


@contextmanager
def _scraped(dispatcher: str, gate: threading.Lock) -> Iterator[None]:
    """Scrape the dispatcher and every worker that it lists, repeatedly while they run."""
    stop, bytes_read = threading.Event(), [0]

    def scrape() -> None:
        ran = 0.0
        while not stop.wait(0.25):
            if not gate.acquire(timeout=1.0):
                continue
            ran += 0.25
            if ran >= _SCRAPE_SECONDS:
                ran = 0.0
                targets = json.loads(_read(f"http://{dispatcher}/workers"))
                where = [dispatcher, *(address for one in targets for address in one["targets"])]
                bytes_read[0] += sum(len(_read(f"http://{address}/metrics")) for address in where)
            gate.release()

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


def _drain(terminal: int, written: threading.Event) -> None:
    try:
        while os.read(terminal, 65536):
            written.set()
    except OSError:  # the other end is closed
        pass


def _cpu_seconds(processes: Sequence[psutil.Process] | None = None) -> float:
    """CPU seconds of processes so far; by default of all but this one, which reads the metrics."""
    times = [each.cpu_times() for each in processes or psutil.Process().children(recursive=True)]
    return sum(one.user + one.system for one in times)


def _row(number: int, what: str, costs: Sequence[float], told: Sequence[str]) -> Row:
    """The median of costs in per cent, with its 95 % confidence interval."""
    ordered, count = sorted(costs), len(costs)
    outside = max(0, int(count / 2 - 0.98 * count**0.5))  # a lower bound of one side's count in fair coin throws
    shown = f"{what}: the middle of {count} pairs, 95 % interval"
    value, spread = median(ordered), (ordered[outside], ordered[-1 - outside])
    return Row(number, shown, value, " %", f"≤ {GOAL:g} %", value <= GOAL, spread, told[0], told[1])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    sys.exit(main())

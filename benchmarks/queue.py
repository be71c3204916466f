"""Compares the farm as a queue with other queues: `python -m benchmarks.queue` prints a table at the end.

All use one Valkey, one after the other. The farm runs with its embedded servers and SQLite, where every job is durable
before it is submitted. Nothing is rendered: the null pipeline draws flat pictures at once.
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import redis
from celery import Task

from benchmarks import peers
from benchmarks.peers import prompt
from benchmarks.rows import Row
from benchmarks.table import publish
from benchmarks.waiting import wait_until
from farm.client.farm import Farm
from farm.client.job import Job
from farm.jobs.database import Database
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.local import LocalFarm
from farm.queue.broker import make_app
from farm.settings import Settings
from farm.specs.spec import RenderSpec

log = logging.getLogger("benchmarks")

SLOTS = 16
THREADS = SLOTS + max(2, SLOTS // 2)
"""The threads of a worker of the farm, and of the bare one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.queue", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="Submit a tenth of the jobs.")
    parser.add_argument(
        "--only",
        type=int,
        nargs="+",
        choices=range(1, 6),
        default=list(range(1, 6)),
        metavar="CASE",
        help="Cases to measure, from 1 to 5; all if omitted.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="File to write the rows to as JSON.")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(relativeCreated)7d ms  %(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="farm-benchmark-") as place:
        farm = LocalFarm(Path(place) / "home", workers=0, dispatcher=False, flower=False)
        with farm:
            peers.app.conf.update(make_app(farm.settings).conf.changes)
            rows = list(Cases(farm.settings, Path(place), 10 if options.quick else 1).run(options.only))
    rows = [replace(row, number=number) for number, row in enumerate(rows, 1)]
    return publish("benchmarks.queue", arguments, rows, options.json)


class Cases:
    """The measurements; each case starts from an empty farm."""

    def __init__(self, settings: Settings, place: Path, part: int) -> None:
        self._settings = settings
        self._place = place
        self._part = part
        self._started = 0

    def run(self, only: Sequence[int]) -> Iterator[Row]:
        """The rows of the requested cases."""
        for number in only:
            log.info("case %d", number)
            case = (self._submitting, self._serving, self._dispatching, self._status, self._killing)[number - 1]
            for row in case():
                log.info("   %s: %.2f%s  %s  %s", row.what, row.value, row.unit, row.farm, row.other)
                yield row

    def _submitting(self) -> Iterator[Row]:
        count, rounds = 20_000 // self._part, 3
        ways = peers.ways(self._settings.broker_url)
        ours: list[float] = []
        theirs: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):  # interleaved, so that other load on the machine affects all of them
            with self._farm() as farm:
                began = time.perf_counter()
                farm.submit(prompt(n) for n in range(count))
                ours.append(time.perf_counter() - began)
            for name, way in ways.items():
                self._flush()
                theirs[name].append(way(count))
        for name, seconds in theirs.items():
            ratios = [other / mine for mine, other in zip(ours, seconds, strict=True)]
            rates = [f"{count / median(each):,.0f} jobs/s" for each in (ours, seconds)]
            yield Row(
                0, f"submitting {count:,} jobs, durable in SQL, beside {name}", median(ratios), " x", "", None,
                (min(ratios), max(ratios)), *rates,
            )  # fmt: skip

    def _serving(self) -> Iterator[Row]:
        count = max(1_000, 5_000 // self._part)
        with self._farm() as farm, ExitStack() as stack:
            stack.enter_context(self._process("farm", "dispatcher"))
            stack.enter_context(self._process("workers", "--name", "w1", FARM_MODELS="tiny=null:", FARM_SLOTS=SLOTS))
            wait_until(partial(_alive, farm, "w1"))
            farm.submit(["warm"] * 50, num_inference_steps=1).wait()
            began = time.perf_counter()
            farm.submit((prompt(n) for n in range(count)), num_inference_steps=1).wait()
            ours = count / (time.perf_counter() - began)
        for task, what, goal in (
            (peers.nothing, "no-ops", 0.5),
            (peers.put, "tasks that put a PNG into S3 and do nothing else", None),
        ):
            theirs = self._bare(task, count)
            yield Row(
                0, f"jobs through claim, null render, PNG, S3 and finish, beside bare Celery's {what}", ours / theirs,
                "", f"≥ {goal}" if goal else "", ours / theirs >= goal if goal else None, None, f"{ours:,.0f} jobs/s",
                f"{theirs:,.0f} jobs/s",
            )  # fmt: skip

    def _bare(self, task: Task[Any, Any], count: int) -> float:
        """Jobs per second through a bare Celery worker, from the first `apply_async` to the last task."""
        self._flush()
        bare = ("celery", "-A", "benchmarks.peers", "worker", "-P", "threads", "-c", str(THREADS), "-Q", "bench")
        with redis.Redis.from_url(self._settings.broker_url) as client, self._process(*bare, "--without-mingle"):

            def run(numbers: range) -> None:
                for n in numbers:
                    task.apply_async((prompt(n),), queue="bench")
                wait_until(lambda: not client.llen("bench") and not client.hlen("unacked"))

            run(range(50))
            began = time.perf_counter()
            run(range(50, 50 + count))
            return count / (time.perf_counter() - began)

    def _dispatching(self) -> Iterator[Row]:
        sizes = [size // self._part for size in (1_000, 100_000, 1_000_000)]
        costs = {}
        for size in sizes:
            with self._store() as store:
                _fill(store, size)
                costs[size] = _dispatch_cost(store)
                log.info("   %d in the backlog: %.0f µs a job", size, costs[size] * 1e6)
        ratio = costs[sizes[-1]] / costs[sizes[0]]
        told = ", ".join(f"{seconds * 1e6:.0f} µs at {size:,}" for size, seconds in costs.items())
        yield Row(0, "dispatching a job, by the backlog behind it", ratio, " x", "≤ 1.2", ratio <= 1.2, None, told)

    def _status(self) -> Iterator[Row]:
        size = 1_000_000 // self._part
        with self._store() as store:
            batch_id = _fill(store, size)
            took = sorted(_timed(lambda: store.queries.batch(batch_id)) for _ in range(50))
        value = median(took) * 1e3
        spread = took[0] * 1e3, took[-1] * 1e3
        yield Row(0, f"status of a batch of {size:,} jobs", value, " ms", "≤ 50", value <= 50, spread)

    def _killing(self) -> Iterator[Row]:
        lease = self._settings.lease_seconds
        took = []
        with self._farm() as farm, self._process("farm", "dispatcher"):
            slow = {"FARM_MODELS": "tiny=null:?seconds_per_step=0.1", "FARM_SLOTS": 4}
            for _ in range(3):
                with self._process("workers", "--name", "first", **slow) as first:
                    wait_until(partial(_alive, farm, "first"))
                    job = next(farm.submit("red", num_inference_steps=600).jobs())
                    wait_until(partial(_reached, job, JobState.RUNNING, 1))
                    with self._process("workers", "--name", "second", **slow):
                        wait_until(partial(_alive, farm, "second"))
                        first.kill()
                        killed = time.perf_counter()
                        wait_until(partial(_reached, job, JobState.RUNNING, 2))
                        took.append(time.perf_counter() - killed)
                        job.cancel()
        value = max(took)
        goal = lease + 2
        yield Row(
            0, f"from kill -9 of a worker to its job running elsewhere, lease {lease:g} s; the worst of {len(took)}",
            value, " s", f"≤ {goal:g} s", value <= goal, (min(took), max(took)),
        )  # fmt: skip

    @contextmanager
    def _farm(self) -> Iterator[Farm]:
        """A client with a new database and an empty Redis."""
        self._fresh()
        with Farm(self._settings) as farm:
            yield farm

    @contextmanager
    def _store(self) -> Iterator[JobStore]:
        database = self._fresh()
        yield JobStore.over(database, self._settings)
        database.close()

    def _fresh(self) -> Database:
        self._flush()
        self._started += 1
        url = f"sqlite:///{self._place / f'farm-{self._started}.db'}"
        self._settings = self._settings.model_copy(update={"database_url": url})
        database = Database(url)
        database.migrate()
        return database

    def _flush(self) -> None:
        with redis.Redis.from_url(self._settings.broker_url) as client:
            client.flushall()

    @contextmanager
    def _process(self, *module: str, **env: object) -> Iterator[subprocess.Popen[bytes]]:
        """Run a Python module with this farm's settings in a process; kill it at the end."""
        secret = self._settings.s3_secret_access_key
        found = {
            "FARM_DATABASE_URL": self._settings.database_url,
            "FARM_BROKER_URL": self._settings.broker_url,
            "FARM_S3_BUCKET": self._settings.s3_bucket,
            "FARM_S3_ENDPOINT_URL": self._settings.s3_endpoint_url,
            "FARM_S3_ACCESS_KEY_ID": self._settings.s3_access_key_id,
            "FARM_S3_SECRET_ACCESS_KEY": secret and secret.get_secret_value(),
            "FARM_FORWARD_SIZES": self._place / "sizes.json",
            **env,
        }
        self._started += 1
        with (self._place / f"{self._started}.log").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *module],
                env={**os.environ, **{name: str(value) for name, value in found.items()}},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _fill(store: JobStore, size: int) -> str:
    return store.submissions.submit("large", "me", 50, (RenderSpec(prompt=prompt(n), seed=n) for n in range(size)))


def _dispatch_cost(store: JobStore, passes: int = 30, each: int = 2 * SLOTS) -> float:
    """Seconds per job, the median of passes; dispatched jobs are put back, which is not counted."""
    took = []
    for _ in range(passes):
        began = time.perf_counter()
        bells = store.backlog.enqueue(each).queued
        took.append((time.perf_counter() - began) / len(bells))
        store.backlog.unqueue([bell.job_id for bell in bells])
    return median(took)


def _alive(farm: Farm, name: str) -> bool:
    return any(one.alive and one.name.startswith(name) for one in farm.workers())


def _reached(job: Job, state: JobState, attempt: int) -> bool:
    info = job.refresh().info
    return (info.state, info.attempt) == (state, attempt)


def _timed(what: Callable[[], object]) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())

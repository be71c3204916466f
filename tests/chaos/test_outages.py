"""Outages of Redis, SQL or S3: pictures are kept, jobs resume, clients get an error, and no process busy-waits."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import psutil
import pytest
import sqlalchemy as sa

from farm.client.batch import Batch
from farm.jobs.schema import BatchRow
from farm.jobs.states import JobState
from farm.specs.object_keys import manifest_key
from tests.chaos.farm import ROOT, SLOTS, ChaosFarm, Standing
from tests.chaos.orders import Scale
from tests.chaos.test_chaos import sweep
from tests.integration.conftest import environment

LEASE_SECONDS = 8.0
SCALE = Scale(jobs=0, batch=(1, 1), steps=(1, 1), seconds_per_step=0.1, backlog=0)
SHORT_STEPS, LONG_STEPS = 4, 160
"""Steps of jobs that are denoised well within one lease, and of a job that takes longer than its lease.

0.4 s are far below the lease and 16 s far above it, so this holds even if the machine stalls for 5 s.
"""
JOBS = 24
REST_SECONDS = LEASE_SECONDS
"""Time after the start of an outage from which every process only waits for the service."""


@contextmanager
def sql_away(farm: ChaosFarm) -> Iterator[None]:
    if farm.postgres is not None:
        farm.postgres.crash()
        try:
            yield
        finally:
            farm.postgres.start()
        return
    with farm.db.write() as session:  # SQLite has no server to stop: hold its write lock
        session.execute(sa.text("SELECT 1"))
        yield


Away = Callable[[ChaosFarm], AbstractContextManager[None]]
AWAY: dict[str, Away] = {"Redis": lambda farm: farm.redis.away(), "S3": lambda farm: farm.s3.away(), "SQL": sql_away}


@pytest.fixture(scope="module", params=["postgresql", pytest.param("sqlite", marks=pytest.mark.chaos)])
def farm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosFarm]:
    with ChaosFarm(
        tmp_path_factory.mktemp("outages"), request.param, 0, SCALE, small=True, lease_seconds=LEASE_SECONDS
    ) as farm:
        yield farm


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seconds", [1.5 * LEASE_SECONDS, pytest.param(60.0, marks=pytest.mark.chaos)])
@pytest.mark.parametrize("service", AWAY)
def test_a_service_that_is_away_costs_time_and_nothing_else(farm: ChaosFarm, service: str, seconds: float) -> None:
    long = farm.farm.submit(["long"], num_inference_steps=LONG_STEPS, name=f"long without {service}")
    farm.wait_until(lambda: running(long) == 1, "the long job is rendered")
    batch = farm.farm.submit(["x"] * JOBS, num_inference_steps=SHORT_STEPS, name=f"without {service}")
    farm.wait_until(lambda: running(batch) >= SLOTS - 1, "short jobs are rendered beside it")
    key = f"{service}, {seconds:g} s"

    with AWAY[service](farm):
        began = time.monotonic()
        refused = handed_in(farm, key)
        farm.hold(REST_SECONDS - (time.monotonic() - began))
        waiting = [Spent(one) for one in (*farm.workers, *farm.dispatchers)]
        farm.hold(seconds - (time.monotonic() - began))
        for one in waiting:
            one.check()
    assert (refused.returncode, refused.stdout, len(refused.stderr.splitlines())) == (3, "", 1), refused
    assert refused.stderr.startswith("farm: ")

    for _ in range(2):
        farm.wait_until(lambda: handed_in(farm, key).returncode == 0, "the batch can be submitted again")
    with farm.db.read() as session:
        (again,) = session.scalars(sa.select(BatchRow.id).where(BatchRow.key == key))
    for each in (batch, long, farm.farm.batch(again)):
        farm.wait_until(lambda each=each: each.status().done, "every batch ends")
        assert each.status().counts[JobState.SUCCEEDED] == each.total
    # Jobs that were denoised when the outage began, or soon after, were kept and not rendered again.
    assert [times_rendered(farm, batch)[job.id] for job in batch] == [1] * JOBS
    assert list(times_rendered(farm, long).values()) == [2 if service == "SQL" else 1]
    sweep(farm)
    assert len(set(farm.storage.keys(f"{batch.id}/")) - {manifest_key(batch.id)}) == JOBS
    # No process exited and was restarted.
    assert [one.starts for one in (*farm.workers, *farm.dispatchers)] == [1, 1]


def running(batch: Batch) -> int:
    return batch.status().counts[JobState.RUNNING]


def times_rendered(farm: ChaosFarm, batch: Batch) -> dict[str, int]:
    said = farm.logs()["w0"]  # the worker logs a claim only if it got the answer, so each line is one rendering
    return {job.id: said.count(f"claimed job_id={job.id} ") for job in batch}


def handed_in(farm: ChaosFarm, key: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "farm", "submit", "late", "--steps", "1", "--name", key, "--key", key],
        cwd=ROOT,
        env=environment(farm.settings),
        capture_output=True,
        text=True,
        timeout=90,
    )


class Spent:
    """CPU time and memory that a process uses from now on."""

    def __init__(self, standing: Standing) -> None:
        self._name, self._process = standing.name, psutil.Process(standing.pid)
        self._began, self._cpu, self._memory = time.monotonic(), self._seconds(), self._bytes()

    def check(self) -> None:
        """Fail if it used more than an idle process should."""
        share = (self._seconds() - self._cpu) / (time.monotonic() - self._began)
        more = self._bytes() - self._memory
        print(f"{self._name}: {share:.1%} of a core, {more / 2**20:+.1f} MiB")
        assert share < 0.2, f"{self._name} spins: {share:.0%} of a core"
        assert more < 24 * 2**20, f"{self._name} uses {more:,} bytes more"

    def _seconds(self) -> float:
        took = self._process.cpu_times()
        return took.user + took.system

    def _bytes(self) -> int:
        return int(self._process.memory_info().rss)

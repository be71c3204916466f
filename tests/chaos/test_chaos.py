"""Chaos tests: under crashes, freezes, hangs and data loss, every job ends exactly once and completely.

A run draws its jobs and faults from a seed, and prints the seed and the command to repeat it; the timing still varies.
`CHAOS_SEED` sets the seed. In the long form, run by `make chaos`, `CHAOS_JOBS` sets the number of jobs and
`CHAOS_MINUTES` the longest time during which faults are injected.
"""

import os
import random
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from farm.dispatch.dispatcher import Dispatcher
from farm.queue.broker import Broker
from tests.chaos import verify
from tests.chaos.farm import ChaosFarm
from tests.chaos.faults import FAULTS, Fault, strike, strokes
from tests.chaos.orders import Order, Scale, order

SHORT = Scale(jobs=150, batch=(3, 14), steps=(15, 60), seconds_per_step=0.03, backlog=16)
LONG = Scale(
    jobs=int(os.environ.get("CHAOS_JOBS", "10000")),
    batch=(5, 60),
    steps=(5, 30),
    seconds_per_step=0.02,
    backlog=60,
)
_BETWEEN_SECONDS = 2.0
"""Longest pause between two faults."""


@pytest.mark.long
@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
def test_a_farm_under_fire_loses_no_job_and_does_none_twice(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        chaos(kind, tmp_path, SHORT, rounds=1, seconds=240, replay="python -m pytest tests/chaos -k 'fire and {kind}'")


@pytest.mark.chaos
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_ten_thousand_jobs_under_fire_for_long(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    minutes = float(os.environ.get("CHAOS_MINUTES", "20"))
    replay = f"CHAOS_JOBS={LONG.jobs} CHAOS_MINUTES={minutes:g} make chaos ARGS='-k {{kind}}'"
    with capsys.disabled():
        chaos(kind, tmp_path, LONG, rounds=10_000, seconds=minutes * 60, replay=replay)


def chaos(kind: str, folder: Path, scale: Scale, *, rounds: int, seconds: float, replay: str) -> None:
    """Inject faults into a busy farm, then check every invariant.

    Stops after `rounds` rounds of all faults, after `seconds`, or, with several rounds, once `scale.jobs` have ended.
    """
    seed = int(os.environ.get("CHAOS_SEED") or secrets.randbelow(2**32))
    again = f"CHAOS_SEED={seed} {replay.format(kind=kind)}"
    print(f"\nchaos on {kind}, seed {seed}; the same again: {again}", flush=True)
    rng, deadline = random.Random(seed), time.monotonic() + seconds
    with ChaosFarm(folder, kind, seed, scale, loud=rounds > 1) as farm, told(farm, again):
        farm.say("up")
        for faults in _drawn(rng, rounds):
            _let_work(farm, rng)
            strike(farm, faults, rng)
            if time.monotonic() > deadline or (rounds > 1 and farm.ended() >= scale.jobs):
                break
        look(farm, max(seconds, 90.0))
        if rounds == 1:
            print(farm.told[-1], flush=True)


def look(farm: ChaosFarm, seconds: float) -> verify.Evidence:
    """Wait for all jobs, stop the farm, and fail if an invariant is broken."""
    farm.settle(seconds)
    farm.say("all jobs have ended")
    farm.stop_users()
    sweep(farm)
    evidence = verify.Evidence.gather(
        farm.db,
        farm.storage,
        farm.journal,
        lambda name, priority: ordered(farm, name, priority),
        farm.logs(),
        farm.deaths(),
    )
    found = list(verify.breaches(evidence))
    attempts = sum(job.attempt for job in evidence.jobs.values())
    starts = sum(one.starts for one in farm.workers)
    farm.say(f"{len(evidence.jobs)} jobs, {attempts} attempts, {starts} starts of workers, looked at")
    if found:
        raise AssertionError("\n".join(found))
    return evidence


def _drawn(rng: random.Random, rounds: int) -> Iterator[tuple[Fault, ...]]:
    left = rounds * len(FAULTS)
    for faults in strokes(rng):
        yield faults
        left -= len(faults)
        if left <= 0:
            return


def _let_work(farm: ChaosFarm, rng: random.Random) -> None:
    """Wait until a job runs, and then for up to seven more jobs to end, for `_BETWEEN_SECONDS` at most."""
    farm.wait_until(farm.busy, "something is rendered")
    until = farm.ended() + rng.randrange(8)
    farm.comes_true(lambda: farm.ended() >= until, _BETWEEN_SECONDS)


def ordered(farm: ChaosFarm, name: str, priority: int) -> Order:
    """The order that was submitted under this name."""
    return order(farm.seed, name, farm.scale.small if name.startswith("urgent") else farm.scale)


def sweep(farm: ChaosFarm) -> None:
    """Sweep the bucket now: after an outage the dispatchers wait long before they sweep."""
    broker = Broker(farm.settings)
    try:
        Dispatcher(farm.store, broker, farm.storage, farm.settings).sweep()
    finally:
        broker.close()


@contextmanager
def told(farm: ChaosFarm, again: str) -> Iterator[None]:
    """Add to an error the faults that were injected, the path of the logs and the command to repeat the run."""
    try:
        yield
    except Exception as error:
        error.add_note("\n".join(["", *farm.told, "", f"logs: {farm.home.logs}", f"the same again: {again}"]))
        raise

"""Concurrent dispatchers on PostgreSQL, where only the farm's own locks keep them from interfering."""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import pytest
import redis

from farm.dispatch.deletion import Deletion
from farm.jobs.states import JobState
from tests.unit.farm.dispatch.conftest import LEASE_SECONDS, WORKER, Parts, made_of

T = TypeVar("T")
COUNT = 4


@pytest.fixture
def several(postgres_url: str, valkey: str, s3: Mapping[str, str | None]) -> Iterator[list[Parts]]:
    """The parts of several dispatchers of one farm, each with its own connections."""
    with ExitStack() as stack:
        yield [stack.enter_context(made_of(postgres_url, valkey, s3)) for _ in range(COUNT)]


def at_once(several: list[Parts], act: Callable[[Parts], T]) -> list[T]:
    """Run `act` for all of them at the same moment; returns the results."""
    start = threading.Barrier(len(several))

    def one(parts: Parts) -> T:
        start.wait()
        return act(parts)

    with ThreadPoolExecutor(len(several)) as pool:
        return list(pool.map(one, several))


def test_dispatchers_that_fill_at_once_publish_one_window_and_no_job_twice(several: list[Parts]) -> None:
    first = several[0]
    jobs = first.submit(20)
    moved = at_once(several, lambda parts: parts.dispatcher().fill())
    assert sum(moved) == first.settings.window
    with redis.Redis.from_url(first.settings.broker_url) as client:
        lists = [key for key in client.scan_iter() if client.type(key) == b"list"]
        assert sum(client.llen(key) for key in lists) == first.settings.window
    assert first.messages() == set(jobs[: first.settings.window])


def test_dispatchers_that_recover_at_once_bring_each_lost_job_back_once(several: list[Parts]) -> None:
    first = several[0]
    jobs = first.submit(8)
    for job in jobs:
        first.claim(job)
        first.shift_lease(job, -1)
    assert sum(at_once(several, lambda parts: parts.dispatcher().recover())) == 8
    assert first.states(jobs) == [JobState.PENDING] * 8
    assert [first.store.queries.job(job).lost_leases for job in jobs] == [1] * 8


def test_a_worker_that_claims_while_messages_are_taken_for_lost_keeps_what_it_claimed(several: list[Parts]) -> None:
    first, second, *_ = several
    jobs = first.submit(4)
    dispatcher = first.dispatcher()
    assert dispatcher.fill() == 4
    with redis.Redis.from_url(first.settings.broker_url) as client:
        client.flushall()
    dispatcher.recover()
    first.clock.pass_by(LEASE_SECONDS)

    def act(parts: Parts) -> set[str]:
        if parts is first:
            dispatcher.recover()
            return set()
        return {job for job in jobs if parts.store.leases.claim(job, WORKER.name) is not None}

    claimed = set.union(*at_once([first, second], act))
    states = dict(zip(jobs, first.states(jobs), strict=True))
    wanted = {job: JobState.RUNNING if job in claimed else JobState.PENDING for job in jobs}
    assert states == wanted


def test_a_batch_that_several_delete_at_once_is_gone_for_each(several: list[Parts]) -> None:
    first = several[0]
    jobs = first.submit(3)
    for job in jobs:
        first.succeed(job)
    batch_id = jobs[0].rpartition("-")[0]
    first.store.deletions.mark(batch_id)
    deleted = at_once(several, lambda parts: Deletion(parts.store.deletions, parts.storage).delete(batch_id))
    assert deleted == [True] * COUNT
    assert list(first.storage.keys()) == []
    assert first.store.deletions.marked() == []

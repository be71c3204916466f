"""Concurrent calls of many threads are made as one call, and each thread gets its own answer."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from farm.errors import DatabaseUnavailable
from workers.service.group_commit import GroupCommit


class Doubling:
    """Doubles numbers, and blocks until `go` is set."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.calls.append(sorted(numbers))
        self.begun.set()
        assert self.go.wait(10)
        if 13 in numbers:
            raise ValueError("13")
        if 99 in numbers:
            raise DatabaseUnavailable("away")
        return [2 * number for number in numbers]


@pytest.fixture
def doubling() -> Doubling:
    return Doubling()


@pytest.fixture
def gathered(doubling: Doubling) -> GroupCommit[int, int]:
    return GroupCommit(doubling, "doubling")


def ask(gathered: GroupCommit[int, int], doubling: Doubling, *numbers: int) -> list[Future[int]]:
    """Ask for 1, and for the other numbers during that call; returns after all calls have ended."""
    with ThreadPoolExecutor(1 + len(numbers)) as threads:
        first = threads.submit(gathered, 1)
        assert doubling.begun.wait(10)
        others = [threads.submit(gathered, number) for number in numbers]
        while gathered._line.qsize() < len(numbers):
            threading.Event().wait(0.001)
        doubling.go.set()
    return [first, *others]


def test_what_is_asked_while_a_call_is_under_way_goes_into_one_call(
    gathered: GroupCommit[int, int], doubling: Doubling
) -> None:
    answers = ask(gathered, doubling, 2, 3, 4)
    assert [answer.result() for answer in answers] == [2, 4, 6, 8]
    assert doubling.calls == [[1], [2, 3, 4]]


def test_an_error_concerns_only_the_call_that_caused_it(gathered: GroupCommit[int, int], doubling: Doubling) -> None:
    _, two, thirteen, four = ask(gathered, doubling, 2, 13, 4)
    assert (two.result(), four.result()) == (4, 8)
    with pytest.raises(ValueError, match="13"):
        thirteen.result()


def test_an_outage_fails_all_calls_without_single_retries(gathered: GroupCommit[int, int], doubling: Doubling) -> None:
    for answer in ask(gathered, doubling, 2, 99, 4)[1:]:
        with pytest.raises(DatabaseUnavailable):
            answer.result()
    assert doubling.calls == [[1], [2, 4, 99]]

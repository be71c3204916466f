"""Parallel transfers: results in order, bounded concurrency, and no transfer left running."""

import threading
from collections.abc import Iterator

import pytest

from farm.runtime.parallel import parallel_map


def test_results_come_in_the_order_of_the_items_whichever_ends_first() -> None:
    second_done = threading.Event()

    def slow_first(item: int) -> int:
        if item == 0:
            assert second_done.wait(30)
        if item == 1:
            second_done.set()
        return item * item

    assert list(parallel_map(slow_first, range(50))) == [item * item for item in range(50)]


def test_an_endless_iterable_is_read_only_a_little_ahead() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = parallel_map(abs, items())
    assert [next(results) for _ in range(3)] == [1, 2, 3]
    assert taken <= 20
    results.close()


@pytest.mark.parametrize("fails", [False, True])
def test_a_caller_that_stops_early_and_an_error_leave_no_call_running(fails: bool) -> None:
    ended: list[int] = []

    def call(item: int) -> int:
        if item == 1 and fails:
            raise ZeroDivisionError
        ended.append(item)
        return item

    results = parallel_map(call, range(100))
    assert next(results) == 0
    if fails:
        with pytest.raises(ZeroDivisionError):
            next(results)
    else:
        results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("parallel")]
    assert len(ended) < 100

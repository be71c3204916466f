"""The delay after a failure grows up to a limit."""

from farm.runtime.backoff import Backoff


def test_the_wait_is_four_times_as_long_after_each_failure_up_to_the_limit() -> None:
    backoff = Backoff(base_seconds=1.0, max_seconds=30.0)
    assert [backoff.most_seconds(failures) for failures in (1, 2, 3, 4, 100)] == [1.0, 4.0, 16.0, 30.0, 30.0]
    assert all(15.0 <= backoff.seconds(4) <= 30.0 for _ in range(100))


def test_an_outage_of_any_length_has_a_longest_wait() -> None:
    assert Backoff(base_seconds=5.0, max_seconds=60.0).most_seconds(100_000) == 60.0

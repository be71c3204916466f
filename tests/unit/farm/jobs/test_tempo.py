"""The rate of a batch, and the lines that report it."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.jobs.tempo import Tempo, tempo
from farm.show.progress_text import blocks, duration, jobs_line, rate, steps_line

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def ago(*seconds: float) -> list[datetime]:
    return [NOW - timedelta(seconds=each) for each in seconds]


def test_the_rate_is_that_of_the_last_minute() -> None:
    endings = ago(*range(1, 60), 100, 200, 300)
    assert tempo(59, endings, NOW) == Tempo(58 / 59, 59 / (58 / 59))


def test_of_a_slow_batch_the_last_eight_tell() -> None:
    assert tempo(4, ago(*range(100, 3000, 100)), NOW).per_second == pytest.approx(7 / 800)


def test_a_batch_that_stands_still_gets_slower() -> None:
    endings = ago(1, 2, 3)
    later = tempo(5, endings, NOW + timedelta(seconds=30))
    assert later.per_second == pytest.approx(2 / 33)
    assert later.eta_seconds == pytest.approx(5 * 33 / 2)


def test_before_the_second_picture_the_measured_steps_tell() -> None:
    assert tempo(10, ago(3), NOW, paces=[0.1, 0.15]) == Tempo(0.25, 40.0)
    assert tempo(10, [], NOW) == Tempo()


def test_nobody_knows_when_a_paused_batch_ends_and_what_has_ended_has_no_rate() -> None:
    assert tempo(10, ago(1, 2), NOW, paused=True) == Tempo(0.5, None)
    assert tempo(0, ago(1, 2), NOW) == Tempo()


def test_pictures_that_end_at_the_same_instant_are_no_division_by_nothing() -> None:
    assert tempo(10, ago(0, 0, 0), NOW).per_second == 2000


def test_the_lines() -> None:
    assert steps_line(12, 20) == "███████░░░░░ 60% step 12/20"
    assert jobs_line(312, 1000, Tempo(4.2, 164)) == "████░░░░░░░░ 312/1000 31% 4.2/s ETA 2m 44s"
    assert jobs_line(0, 3, Tempo(), "paused") == "░░░░░░░░░░░░ 0/3 0% paused"


def test_a_bar_is_full_only_when_all_is_done() -> None:
    assert blocks(0.999, 10) == ("█" * 9, "░")
    assert blocks(1.0, 10) == ("█" * 10, "")


@given(st.floats(0, 2), st.integers(1, 80))
def test_a_bar_is_as_wide_as_asked(fraction: float, width: int) -> None:
    assert sum(map(len, blocks(fraction, width))) == width


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.2, "0s"), (59.6, "1m 00s"), (164, "2m 44s"), (11_100, "3h 05m"), (200_000, "2d 07h")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("per_second", "shown"), [(161.3, "161/s"), (4.23, "4.2/s"), (0.05, "3.0/min"), (0.001, "3.6/h")]
)
def test_rates(per_second: float, shown: str) -> None:
    assert rate(per_second) == shown

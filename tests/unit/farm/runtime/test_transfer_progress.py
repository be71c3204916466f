"""The log lines of a long transfer, and their frequency."""

import logging
import re

import pytest

from farm.runtime import transfer_progress as transfer_bar
from farm.runtime.transfer_progress import transfer_lines

MIB = 2**20


def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, seconds: float, count: int) -> list[int]:
    """Return the MiB in each line, for `count` of 100 MiB that arrive one every `seconds`."""
    clock = [0.0]
    monkeypatch.setattr(transfer_bar.time, "monotonic", lambda: clock[0])
    caplog.set_level("INFO")
    with transfer_lines("fetching it", 100 * MIB, logging.getLogger("test")) as advance:
        for _ in range(count):
            clock[0] += seconds
            advance(MIB)
    return [int(found[1]) for found in re.finditer(r"fetching it: (\d+) of 100 MiB", caplog.text)]


def test_a_line_comes_with_each_tenth(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(caplog, monkeypatch, 0.5, 100) == list(range(10, 101, 10))


def test_a_slow_transfer_logs_every_ten_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told(caplog, monkeypatch, 5, 7) == [2, 4, 6]


def test_a_fast_transfer_logs_once_a_second(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(caplog, monkeypatch, 0.03125, 100) == [32, 64, 96]

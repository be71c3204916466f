"""The conditions under which a worker ends itself."""

import os
import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from workers.service.watchdog import Watchdog


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The signals and exit statuses that would have ended the process."""
    ended: list[int] = []
    monkeypatch.setattr(os, "kill", lambda _pid, number: ended.append(number))
    monkeypatch.setattr(os, "_exit", ended.append)
    return ended


def engine(failed: BaseException | None = None, busy_seconds: float = 0.0) -> Any:
    return SimpleNamespace(failed=failed, busy_seconds=busy_seconds)


def test_a_worker_with_a_broken_engine_drains_once(ended: list[int]) -> None:
    watchdog = Watchdog(engine(failed=RuntimeError("the device is lost")), 300.0, threading.Event())
    watchdog.check()
    watchdog.check()
    assert ended == [signal.SIGTERM]


def test_a_worker_that_drains_already_is_not_told_again(ended: list[int]) -> None:
    draining = threading.Event()
    draining.set()
    Watchdog(engine(failed=RuntimeError("the device is lost")), 300.0, draining).check()
    assert ended == []


def test_a_worker_whose_forward_hangs_ends_at_once(ended: list[int]) -> None:
    Watchdog(engine(busy_seconds=300.1), 300.0, threading.Event()).check()
    assert ended == [os.EX_SOFTWARE]


def test_a_healthy_worker_goes_on(ended: list[int]) -> None:
    Watchdog(engine(busy_seconds=299.9), 300.0, threading.Event()).check()
    assert ended == []

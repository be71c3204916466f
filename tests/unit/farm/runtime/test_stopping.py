"""A stop signal reaches a running program at any moment."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from farm.runtime.stopping import stop_signals

IN_THE_EVENTS_LOCK = """
import signal, threading
from farm.runtime.stopping import stop_signals
stop, hurry = threading.Event(), threading.Event()
with stop_signals(stop, hurry):
    for event in (stop, hurry):
        with event._cond:  # as for a moment within event.wait()
            signal.raise_signal(signal.SIGTERM)
        event.wait()
"""


def test_a_signal_during_the_wait_for_it_is_handled() -> None:
    subprocess.run([sys.executable, "-c", IN_THE_EVENTS_LOCK], check=True, timeout=60)


@pytest.fixture(autouse=True)
def terminal() -> Iterator[None]:
    """Restore the default action of SIGHUP, as in a process that was not started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_stops_and_any_further_one_hurries(number: signal.Signals) -> None:
    stop, hurry, before = threading.Event(), threading.Event(), signal.getsignal(number)
    with stop_signals(stop, hurry):
        os.kill(os.getpid(), number)
        assert stop.wait(20)
        assert not hurry.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert hurry.wait(20)
    assert signal.getsignal(number) == before


def test_a_process_started_by_nohup_ignores_a_hangup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_signals(stop := threading.Event()):
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(20)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_without_a_hurry_event_every_signal_only_stops() -> None:
    stop = threading.Event()
    with stop_signals(stop):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(20)

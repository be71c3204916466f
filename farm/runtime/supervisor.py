"""Keeps child processes running: starts, watches, restarts them with back-off, and stops them in order."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from farm.runtime.child_process import ChildProcess

POLL_SECONDS = 0.1
"""The interval between calls of `KeptProcess.tend`."""

P = TypeVar("P", bound=ChildProcess)


@dataclass(frozen=True)
class Program(Generic[P]):
    """A process to keep running."""

    name: str
    start: Callable[[], P]
    """Starts a new process."""
    stop_seconds: float
    """The time to stop before it is killed."""
    answers: Callable[[P], bool] = lambda _: True
    """Called at every poll until it returns True: the process is ready for use."""
    ready_seconds: float = float("inf")
    """The time until a new process must answer."""
    survives_kill: bool = False
    """Whether it loses nothing when it is killed: no line reports it when it does not stop in time."""


@dataclass(frozen=True)
class Fault(Generic[P]):
    """The reason to replace a process."""

    process: P
    status: int | None
    """Its exit status, negative for a signal; None if it did not answer in `ready_seconds`."""


@dataclass(frozen=True)
class RestartPolicy(Generic[P]):
    """Whether and when a process is replaced, and the lines that report it."""

    delay_seconds: Callable[[int], float]
    """The delay after this many consecutive faults, from 1."""
    healthy_seconds: float
    """The ready time after which earlier faults no longer count."""
    restarting: Callable[[Program[P], Fault[P], int, float], str]
    """The line for a fault, the number of consecutive faults, and the delay."""
    refused: Callable[[Program[P], Fault[P]], str | None] = lambda _program, _fault: None
    """The line for a process that would fail in the same way again and is not replaced; None if it is replaced."""


class KeptProcess(Generic[P]):
    """Keeps a program running: its current process, or the time of the next start.

    Use it from one thread that lives as long as the processes should: on Linux they are killed when that thread ends.
    """

    def __init__(self, program: Program[P], policy: RestartPolicy[P], report: Callable[[str], None]) -> None:
        """`report` takes a line of text about a fault."""
        self.program = program
        self.process: P | None = None
        self.refused = False
        """Whether it is not started again."""
        self.report = report
        self._policy = policy
        self._started_at = 0.0
        self._ready_at: float | None = None
        self._start_at = 0.0
        self._faults = 0

    @property
    def ready(self) -> bool:
        """Whether it runs and has answered."""
        return self._ready_at is not None

    @property
    def lives(self) -> bool:
        """Whether its process is running."""
        return self.process is not None and self.process.ended() is None

    def start(self) -> None:
        """Start its process."""
        self._started_at, self._ready_at = time.monotonic(), None
        self.process = self.program.start()

    def fault(self) -> Fault[P] | None:
        """The fault of its process; None while the process lives and answers in time, or if it has no process."""
        process, now = self.process, time.monotonic()
        if process is None:
            return None
        status = process.ended()
        if status is not None:
            return Fault(process, status)
        if self._ready_at is None and self.program.answers(process):
            self._ready_at = now
        late = self._ready_at is None and now - self._started_at > self.program.ready_seconds
        return Fault(process, None) if late else None

    def tend(self) -> None:
        """Detect a fault, and restart the process when its delay is over; call this every `POLL_SECONDS`."""
        if self.process is None:
            if not self.refused and time.monotonic() >= self._start_at:
                self.start()
            return
        fault = self.fault()
        if fault is not None:
            self._replace(fault)

    def end(self) -> None:
        """Kill the rest of its process group."""
        self._ready_at = None
        if self.process is not None:
            self.process.clear()
            self.process = None

    def _replace(self, fault: Fault[P]) -> None:
        now, ready_at = time.monotonic(), self._ready_at
        self.end()
        if (refused := self._policy.refused(self.program, fault)) is not None:
            self.refused = True
            self.report(refused)
            return
        if ready_at is not None and now - ready_at > self._policy.healthy_seconds:
            self._faults = 0
        self._faults += 1
        delay = self._policy.delay_seconds(self._faults)
        self._start_at = now + delay
        self.report(self._policy.restarting(self.program, fault, self._faults, delay))


def stop_all(kept: Sequence[KeptProcess[P]], hurry: threading.Event, report: Callable[[str], None]) -> None:
    """Ask all processes to stop at once; kill those that take too long, or all of them when `hurry` is set."""
    for each in kept:
        if each.process is not None:
            each.process.ask_to_stop()
    asked = time.monotonic()
    living = [each for each in kept if each.lives]
    while living and not hurry.wait(POLL_SECONDS / 2):
        living = [each for each in living if each.lives]
        for each in list(living):
            seconds = each.program.stop_seconds
            if time.monotonic() - asked > seconds:
                if not each.program.survives_kill:
                    report(f"{each.program.name} did not stop in {seconds:.0f} s: killed")
                living.remove(each)
    for each in kept:
        each.end()

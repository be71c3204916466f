"""Child processes kept running: started, watched, restarted with back-off, and stopped in order."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from farm.runtime.child_process import ChildProcess

POLL_SECONDS = 0.1
"""How often `KeptProcess.tend` is to be called."""

P = TypeVar("P", bound=ChildProcess)


@dataclass(frozen=True)
class Program(Generic[P]):
    """A process that is to be kept running."""

    name: str
    start: Callable[[], P]
    """Called for every new process of it."""
    stop_seconds: float
    """How long it may take to stop before it is killed."""
    answers: Callable[[P], bool] = lambda _: True
    """Called at every poll until it returns True: the process is ready for use."""
    ready_seconds: float = float("inf")
    """How long a new process may take until it answers."""
    survives_kill: bool = False
    """Whether it loses nothing when it is killed: no line reports it when it does not stop in time."""


@dataclass(frozen=True)
class Fault(Generic[P]):
    """Why a process has to be replaced."""

    process: P
    status: int | None
    """Its exit status, negative for a signal; None for one that does not answer in `ready_seconds`."""


@dataclass(frozen=True)
class RestartPolicy(Generic[P]):
    """When a process is replaced, and the line that reports it."""

    delay_seconds: Callable[[int], float]
    """How long to wait after so many faults in a row, from 1."""
    healthy_seconds: float
    """After so long ready for use, earlier faults no longer count."""
    restarting: Callable[[Program[P], Fault[P], int, float], str]
    """The line for a fault, the number of faults in a row, and the delay."""
    refused: Callable[[Program[P], Fault[P]], str | None] = lambda _program, _fault: None
    """The line for a process that would end the same way again and is not replaced; None for any other."""


class KeptProcess(Generic[P]):
    """One program that is kept running: its present process, or when the next one starts.

    Use it from one thread that lives as long as the processes shall: on Linux they are killed with that thread.
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
        """Whether its process runs."""
        return self.process is not None and self.process.ended() is None

    def start(self) -> None:
        """Start a process of it."""
        self._started_at, self._ready_at = time.monotonic(), None
        self.process = self.program.start()

    def fault(self) -> Fault[P] | None:
        """What is wrong with its process; None while that lives and answers in time, or where it has none."""
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
        """Notice a fault, and start again when the time has come; call it every `POLL_SECONDS`."""
        if self.process is None:
            if not self.refused and time.monotonic() >= self._start_at:
                self.start()
            return
        fault = self.fault()
        if fault is not None:
            self._replace(fault)

    def end(self) -> None:
        """Kill what is left of its process."""
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
    """Ask these processes to stop, all at once; kill those that take too long, or all of them when `hurry` is set."""
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

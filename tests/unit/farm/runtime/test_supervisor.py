"""Supervised processes: small shell programs in place of servers and workers."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

from farm.runtime.child_process import ChildProcess
from farm.runtime.supervisor import Fault, KeptProcess, Program, RestartPolicy, stop_all
from tests.integration.conftest import wait_until

STAYS = "trap '' TERM; echo up; while :; do sleep 0.05; done"


class Supervised:
    """One supervised process and its reported lines."""

    def __init__(self, script: str, healthy_seconds: float = 1000.0, **program: object) -> None:
        self.lines: list[str] = []
        policy = RestartPolicy[ChildProcess](lambda _: 0.0, healthy_seconds, self._restarting, self._refused)
        made = Program("a", lambda: Shell(script), **{"stop_seconds": 10.0, **program})  # type: ignore[arg-type]
        self.kept = KeptProcess(made, policy, self.lines.append)

    def _restarting(self, program: Program[ChildProcess], fault: Fault[ChildProcess], faults: int, delay: float) -> str:
        return f"{program.name} {fault.status} {faults} {delay:g}"

    def _refused(self, program: Program[ChildProcess], fault: Fault[ChildProcess]) -> str | None:
        return f"{program.name} refused" if fault.status == 2 else None

    def tend_until(self, true: Callable[[], bool], what: str) -> None:
        def tended() -> bool:
            self.kept.tend()
            return true()

        wait_until(tended, what, 20)


class Shell(ChildProcess):
    """A shell program whose output is read."""

    def __init__(self, script: str) -> None:
        super().__init__(["/bin/sh", "-c", script], env=dict(os.environ), output=subprocess.PIPE)
        self.last_words = b""

    def clear(self) -> None:
        super().clear()
        assert self.output is not None
        with self.output:
            self.last_words = self.output.read()


def up(process: ChildProcess) -> bool:
    """Wait for the first line of output; returns whether there was one."""
    assert process.output is not None
    return bool(process.output.readline())


@pytest.fixture
def supervise() -> Iterator[Callable[..., Supervised]]:
    made: list[Supervised] = []

    def begin(script: str, **more: object) -> Supervised:
        made.append(Supervised(script, **more))  # type: ignore[arg-type]
        return made[-1]

    yield begin
    for each in made:
        each.kept.end()


def test_a_process_that_ends_is_started_again_and_its_faults_are_counted(
    supervise: Callable[..., Supervised],
) -> None:
    supervised = supervise("exit 7")
    supervised.tend_until(lambda: len(supervised.lines) == 3, "three ends")
    assert supervised.lines == ["a 7 1 0", "a 7 2 0", "a 7 3 0"]


def test_faults_before_a_healthy_time_no_longer_count(supervise: Callable[..., Supervised]) -> None:
    supervised = supervise("echo up; sleep 60", healthy_seconds=-1.0, answers=up)
    for ends in (1, 2):
        supervised.tend_until(lambda: supervised.kept.ready, "it is ready")
        assert supervised.kept.process is not None
        os.kill(supervised.kept.process.pid, signal.SIGKILL)
        supervised.tend_until(lambda count=ends: len(supervised.lines) == count, "it ended")
    assert supervised.lines == ["a -9 1 0", "a -9 1 0"]


def test_a_process_that_would_end_the_same_way_again_is_not_started_again(
    supervise: Callable[..., Supervised],
) -> None:
    supervised = supervise("exit 2")
    supervised.tend_until(lambda: supervised.kept.refused, "it is refused")
    supervised.kept.tend()
    assert (supervised.lines, supervised.kept.process) == (["a refused"], None)


def test_a_process_that_does_not_answer_in_time_is_replaced(supervise: Callable[..., Supervised]) -> None:
    supervised = supervise("sleep 60", answers=lambda _: False, ready_seconds=0.0)
    supervised.tend_until(lambda: len(supervised.lines) == 1, "it is replaced")
    assert supervised.lines == ["a None 1 0"]


@pytest.mark.parametrize(("survives_kill", "lines"), [(False, ["a did not stop in 0 s: killed"]), (True, [])])
def test_a_process_that_does_not_stop_in_time_is_killed(
    supervise: Callable[..., Supervised], survives_kill: bool, lines: list[str]
) -> None:
    supervised = supervise(STAYS, answers=up, stop_seconds=0.1, survives_kill=survives_kill)
    supervised.tend_until(lambda: supervised.kept.ready, "it is ready")
    stop_all([supervised.kept], threading.Event(), supervised.lines.append)
    assert (supervised.lines, supervised.kept.process) == (lines, None)


def test_all_are_killed_at_once_when_it_is_urgent(supervise: Callable[..., Supervised]) -> None:
    several = [supervise(STAYS, answers=up, stop_seconds=600.0) for _ in range(2)]
    for supervised in several:
        supervised.tend_until(lambda each=supervised: each.kept.ready, "it is ready")
    hurry = threading.Event()
    hurry.set()
    stop_all([supervised.kept for supervised in several], hurry, several[0].lines.append)
    assert [supervised.kept.lives for supervised in several] == [False, False]
    assert several[0].lines == []


def test_a_process_that_stops_when_it_is_asked_is_not_killed(supervise: Callable[..., Supervised]) -> None:
    supervised = supervise("trap 'echo stopped; exit 0' TERM; echo up; while :; do sleep 0.05; done", answers=up)
    supervised.tend_until(lambda: supervised.kept.ready, "it is ready")
    process = supervised.kept.process
    stop_all([supervised.kept], threading.Event(), supervised.lines.append)
    assert isinstance(process, Shell)
    assert process.last_words == b"stopped\n"

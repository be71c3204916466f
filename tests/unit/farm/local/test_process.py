"""The process of a part: its log, its pid file, and cleanup after a killed farm."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from farm.local import process
from farm.local.home import Home
from farm.local.process import PartProcess, end_leftovers, rotate_log
from tests.integration.conftest import wait_until


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "home")
    home.take()
    yield home
    home.release()


def ended(home: Home, program: str) -> PartProcess:
    """Run a program as a part until it ends."""
    part = PartProcess("part", [sys.executable, "-c", program], home=home, env=os.environ)
    wait_until(lambda: part.ended() is not None, "it ends", 30)
    return part


def test_the_last_lines_are_those_of_this_start_and_steer_no_terminal(home: Home) -> None:
    ended(home, "print('of the run before')").clear()
    part = ended(home, "print('one\\n\\n  \\ntwo\\n\\033[31mthree')")
    assert part.written().startswith(b"one")
    assert part.last_lines(2)[0] == "two"
    assert "three" in part.last_lines(2)[1]
    assert "\033" not in part.last_lines(2)[1]
    assert b"of the run before" in part.log.read_bytes()
    part.clear()


def test_a_log_that_has_grown_too_long_is_moved_aside(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    part = ended(home, "print('x' * 100)")
    part.bound_log()
    assert len(part.written()) == 101
    monkeypatch.setattr(process, "LOG_BYTES", 100)
    part.bound_log()
    assert part.written() == b""
    assert part.log.with_suffix(".log.1").read_text() == "x" * 100 + "\n"
    part.clear()


def test_the_log_of_the_last_run_is_moved_aside_unless_it_is_empty(home: Home) -> None:
    log, before = home.logs / "part.log", home.logs / "part.log.1"
    rotate_log(home, "part")
    log.touch()
    rotate_log(home, "part")
    assert not before.exists()
    log.write_text("said\n")
    rotate_log(home, "part")
    assert before.read_text() == "said\n"
    assert not log.exists()


def test_a_part_that_is_cleared_away_leaves_no_pid_file_and_no_litter(home: Home, tmp_path: Path) -> None:
    litter = tmp_path / "socket"
    litter.touch()
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    part = PartProcess("part", sleep, home=home, env=os.environ, litter=[litter])
    assert not litter.exists()
    litter.touch()
    assert json.loads((home.run / "part.pid").read_text())["pid"] == part.pid
    part.clear()
    assert not alive(part.pid)
    assert not list(home.run.iterdir())
    assert not litter.exists()


def test_a_leftover_process_is_ended_and_a_stranger_with_its_id_is_not(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.take()
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(sleep, start_new_session=True) as ours, subprocess.Popen(sleep) as stranger:
        try:
            created = {one.pid: psutil.Process(one.pid).create_time() for one in (ours, stranger)}
            (home.run / "ours.pid").write_text(json.dumps({"pid": ours.pid, "create_time": created[ours.pid]}))
            (home.run / "gone.pid").write_text(
                json.dumps({"pid": stranger.pid, "create_time": created[stranger.pid] - 60})
            )
            (home.run / "torn.pid").write_text('{"pid": 1')
            assert end_leftovers(home) == ["ours"]
            assert not alive(ours.pid)
            assert stranger.poll() is None
            assert not list(home.run.iterdir())
        finally:
            ours.kill()
            stranger.kill()
    home.release()


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

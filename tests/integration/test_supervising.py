"""The supervisor of one machine's workers: it restarts and drains them, and they never outlive it."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from farm.client.farm import Farm
from farm.errors import AlreadyRunning
from farm.jobs.database import Database
from farm.jobs.schema import ReleaseRow
from farm.jobs.states import JobState
from farm.settings import Settings
from tests.integration.conftest import Crew, environment, wait_until
from tests.servers import needs_torch
from workers.service.supervisor import REFUSED, _only_one

HOST = socket.gethostname()

Start = Callable[..., "Supervised"]


class Supervised:
    """A supervisor of small programs in place of workers; a thread reads its output."""

    def __init__(self, program: str, names: str = "a", *, until: str | None = None, **constants: object) -> None:
        code = (
            "import signal, sys; import workers.service.supervisor as s; from farm.runtime.backoff import Backoff\n"
            "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # the tests may run under nohup, which ignores it
            f"for name, value in {constants!r}.items(): setattr(s, name, value)\n"
            "s.RESTART_BACKOFF = Backoff(0.02, 0.2)\n"
            f"seats = [s.Seat(name) for name in {names!r}.split()]\n"
            f"sys.exit(s.Crew(seats, [sys.executable, '-I', '-S', '-c', {program!r}], s.STOP_MARGIN_SECONDS).run())"
        )
        self.popen = subprocess.Popen(
            [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self._lines: list[str] = []
        self._until = until
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        with self.popen.stderr as stream:
            for line in stream:
                self._lines.append(line.rstrip("\n"))
                if self._until is not None and self._until in line:
                    return

    def said(self, text: str) -> list[str]:
        """Wait for a line with this text; returns all such lines."""
        wait_until(lambda: any(text in line for line in self._lines), f"{text!r} is said", 20)
        return [line for line in self._lines if text in line]

    def wait(self) -> int:
        status = self.popen.wait(20)
        self._reader.join(5)
        return status

    @property
    def lines(self) -> list[str]:
        return list(self._lines)


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Supervised] = []

    def begin(program: str, names: str = "a", **more: object) -> Supervised:
        started.append(Supervised(program, names, **more))  # type: ignore[arg-type]
        return started[-1]

    yield begin
    for one in started:
        if one.popen.poll() is None:
            one.popen.kill()
            one.popen.wait()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def pid_said(line: str) -> int:
    return int(line.rpartition(" ")[2])


def test_a_worker_that_dies_is_started_again_ever_later(start: Start) -> None:
    crew = start("import sys; print('out of luck'); sys.exit(1)")
    crew.said("5 times in a row: it does not come up")
    ends = [line for line in crew.lines if "ended with 1" in line]
    assert ends[0] == "a ended with 1; starting again: out of luck"
    assert "in a row" not in ends[1]
    assert crew.lines.count("a | out of luck") >= 5
    crew.popen.terminate()
    assert crew.wait() == 0


def test_a_worker_that_is_killed_is_started_again_beside_the_others(start: Start) -> None:
    crew = start("import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)", "a b")
    first, other = pid_said(crew.said("a | pid")[0]), pid_said(crew.said("b | pid")[0])
    os.kill(first, signal.SIGKILL)
    crew.said("a was killed by signal 9; starting again")
    wait_until(lambda: len(crew.said("a | pid")) == 2, "a is back")
    assert len(crew.said("b | pid")) == 1
    assert not gone(other)


def test_a_worker_that_is_refused_is_not_started_again(start: Start) -> None:
    crew = start(
        "import sys, time\n"
        "if sys.argv[-1] == 'a': print('no schema'); sys.exit(2)\n"
        "print('up', flush=True); time.sleep(60)",
        "a b",
    )
    assert crew.said("not started again") == ["a ended with 2 and is not started again: no schema"]
    crew.said("b | up")
    crew.popen.terminate()
    assert crew.wait() == 0
    assert crew.lines.count("a | no schema") == 1


def test_where_every_worker_is_refused_the_supervisor_is_too(start: Start) -> None:
    crew = start("import sys; sys.exit(2)", "a b")
    assert crew.wait() == 2
    assert crew.lines[-1] == "farm worker: no worker can run here"


DRAINS = """
import os, signal, sys, time
def drain(*_):  # it may come amid the print below, which another print there would not survive
    os.write(1, b'draining\\n'); time.sleep(0.3); os.write(1, b'drained\\n'); sys.exit(0)
signal.signal(signal.SIGTERM, drain); print('up', flush=True); time.sleep(60)
"""
STAYS = (
    "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('pid', os.getpid(), flush=True); time.sleep(60)"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_all_drain_when_it_is_told_to_stop(start: Start, number: signal.Signals) -> None:
    crew = start(DRAINS, "a b")
    crew.said("a | up")
    crew.said("b | up")
    crew.popen.send_signal(number)
    assert crew.wait() == 0
    assert {"a | drained", "b | drained"} <= set(crew.lines)


def test_a_second_signal_ends_all_at_once(start: Start) -> None:
    crew = start(STAYS)
    pid = pid_said(crew.said("a | pid")[0])
    crew.popen.terminate()
    crew.said("Ctrl-C again to stop at once")
    assert crew.popen.poll() is None
    crew.popen.terminate()
    assert crew.wait() == 0
    assert gone(pid)


def test_who_does_not_stop_in_time_is_killed(start: Start) -> None:
    crew = start(STAYS, STOP_MARGIN_SECONDS=0.2)
    pid = pid_said(crew.said("a | pid")[0])
    crew.popen.terminate()
    assert crew.wait() == 0
    assert "a did not stop in 0 s: killed" in crew.lines
    assert gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_no_worker_outlives_a_supervisor_that_is_killed(start: Start) -> None:
    crew = start(STAYS)
    pid = pid_said(crew.said("a | pid")[0])
    crew.popen.kill()
    wait_until(lambda: gone(pid), "the worker is gone", 10)


def test_nothing_of_what_a_worker_says_steers_the_terminal(start: Start) -> None:
    crew = start("import time; print('\\x1b[2Jred\\rb | forged', flush=True); time.sleep(60)")
    assert crew.said("forged") == ["a | \ufffd[2Jred b | forged"]


def test_a_reader_that_goes_away_stops_no_worker(start: Start) -> None:
    flood = "import os, time; print('pid', os.getpid(), flush=True)\nwhile 1: print('x', flush=True); time.sleep(0.001)"
    crew = start(flood, until="a | pid")
    pid = pid_said(crew.said("a | pid")[0])
    crew._reader.join(5)
    with pytest.raises(subprocess.TimeoutExpired):
        crew.popen.wait(1)
    assert not gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="the name is kept in Linux's kernel")
def test_two_workers_of_one_name_on_one_machine_are_refused() -> None:
    settings = Settings(database_url="sqlite:///one.db", broker_url="", s3_bucket="")
    with _only_one("gpu0", settings):
        with pytest.raises(AlreadyRunning, match=r"gpu0 .* --name"), _only_one("gpu0", settings):
            pass
        with _only_one("gpu1", settings), _only_one("gpu0", settings.model_copy(update={"database_url": "other"})):
            pass
    with _only_one("gpu0", settings):
        pass


def test_a_schema_that_does_not_fit_is_refused_in_one_line(sqlite_url: str, tmp_path: Path) -> None:
    needs_torch()
    file = tmp_path / "farm.env"
    file.write_text(f"FARM_DATABASE_URL={sqlite_url}\nFARM_BROKER_URL=redis://:x@127.0.0.1:1/0\nFARM_S3_BUCKET=b\n")
    file.chmod(0o600)
    database = Database(sqlite_url)
    with database.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
        session.add(ReleaseRow(revision="9999", version="9.9", serves_from="9998"))
    database.close()
    said = subprocess.run(
        [sys.executable, "-m", "farm", "worker", "--env", file, "--workers", "2"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert said.returncode == REFUSED
    (line,) = said.stderr.splitlines()
    assert line.startswith("farm worker: the database's schema is 9999, of farm 9.9")
    assert line.endswith("pip install 'diffusion-farm==9.9' here")


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.long
def test_one_command_puts_a_worker_on_each_gpu(crew: Crew, farm: Farm, tmp_path: Path) -> None:
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text("#!/bin/sh\nprintf 'GPU 0: Fake (UUID: GPU-aa)\\nGPU 1: Fake (UUID: GPU-bb)\\n'\n")
    driver.chmod(0o755)
    env = {"PATH": f"{driver.parent}:{os.environ['PATH']}", "FARM_DEVICE": "cpu", "FARM_SLOTS": 2}
    models = "tiny=null:?seconds_per_step=0.02"
    node = crew.supervisor("--gpus", "all", f"--models={models}", **env)
    names = {f"gpu0@{HOST}", f"gpu1@{HOST}"}
    wait_until(lambda: {one.name for one in farm.workers() if one.alive} == names, "both are there")

    def worker(name: str) -> int:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
                mine = os.getsid(int(entry.name)) == int(entry.name) and arguments[-3:-1] == [b"--name", name.encode()]
                if mine and f"PATH={driver.parent}".encode() in (entry / "environ").read_bytes():
                    return int(entry.name)
            except OSError:
                continue
        raise AssertionError(f"no {name}")

    assert b"\0CUDA_VISIBLE_DEVICES=GPU-bb\0" in Path(f"/proc/{worker('gpu1')}/environ").read_bytes()
    assert b"libtorch" not in Path(f"/proc/{node.popen.pid}/maps").read_bytes()

    crew.dispatcher()
    batch = farm.submit([f"picture {n}" for n in range(60)], num_inference_steps=20)
    wait_until(lambda: {job.info.worker for job in batch.jobs(states=[JobState.RUNNING])} == names, "both render")
    began = {one.name: one.started_at for one in farm.workers()}
    first = worker("gpu0")
    os.kill(first, signal.SIGKILL)
    batch.wait(timeout=60)
    assert batch.status().counts[JobState.SUCCEEDED] == 60
    wait_until(lambda: len([one for one in farm.workers() if one.alive]) == 2, "gpu0 is back")
    again = {one.name: one.started_at for one in farm.workers()}
    assert again[f"gpu0@{HOST}"] > began[f"gpu0@{HOST}"]  # type: ignore[operator]
    assert again[f"gpu1@{HOST}"] == began[f"gpu1@{HOST}"]

    # A second worker of the same name would take the first one's jobs.
    second = subprocess.run(
        [sys.executable, "-m", "farm", "worker", "--gpus", "1"],
        env=environment(crew.settings, **env),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (second.returncode, "a worker gpu0 of this farm runs on this machine" in second.stderr) == (2, True)

    left = [worker("gpu0"), worker("gpu1")]
    assert node.stop() == 0
    assert all(map(gone, left))
    assert farm.workers() == []  # they deregistered

"""Fixtures that run workers and dispatchers as real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from farm.client.farm import Farm
from farm.jobs.database import Database
from farm.settings import Settings
from tests.forked import ForkedProcess, run_forked
from tests.servers import needs_torch


def environment(settings: Settings, **more: object) -> dict[str, str]:
    """Environment variables that configure a process for these services."""
    secret = settings.s3_secret_access_key
    values = {
        "FARM_DATABASE_URL": settings.database_url,
        "FARM_BROKER_URL": settings.broker_url,
        "FARM_S3_BUCKET": settings.s3_bucket,
        "FARM_S3_ENDPOINT_URL": settings.s3_endpoint_url or "",
        "FARM_S3_ACCESS_KEY_ID": settings.s3_access_key_id or "",
        "FARM_S3_SECRET_ACCESS_KEY": secret.get_secret_value() if secret else "",
        "FARM_HOME": str(settings.home),
        "FARM_LEASE_SECONDS": str(settings.lease_seconds),
        "FARM_BEAT_SECONDS": str(settings.beat_seconds),
        "FARM_FORWARD_SIZES": str(settings.forward_sizes),
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in more.items()},
    }
    return {**os.environ, **values}


def wait_until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait until a condition holds; fails with the description on timeout."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"in {seconds} s: not {what}"
        time.sleep(0.02)


@dataclass
class Process:
    """A process of the farm, and its log."""

    popen: "subprocess.Popen[bytes] | ForkedProcess"
    log: Path
    name: str = ""

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()

    def stop(self, seconds: float = 30) -> int:
        """End it with SIGTERM; returns its exit code."""
        self.popen.terminate()
        return self.popen.wait(seconds)


class Crew:
    """The dispatcher and workers of one test."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self._folder = folder
        self._started: list[Process] = []

    def dispatcher(self, **env: object) -> Process:
        """Start a dispatcher process."""
        return self._start("dispatcher", "farm", ["dispatcher"], env)

    def worker(self, name: str = "w1", models: str = "tiny=null:", slots: int = 4, **more: Any) -> Process:
        """Start a worker as `start_worker` does, and wait until it is registered."""
        process = self.start_worker(name, models, FARM_SLOTS=slots, **more)
        with Farm(self.settings) as farm:
            wait_until(
                lambda: (
                    process.popen.poll() is not None
                    or any(one.name.startswith(f"{name}@") and one.alive for one in farm.workers())
                ),
                f"worker {name} is there",
            )
        assert process.popen.poll() is None, process.log.read_text()
        return process

    def start_worker(
        self, name: str, models: str, *, fresh: bool = False, data_kib: int | None = None, **env: object
    ) -> Process:
        """Start a worker without waiting for it. `data_kib` limits its memory.

        `fresh`: start a new interpreter, for variables that packages read at import.
        """
        needs_torch()
        return self._start(
            name, "workers", ["--name", name], {"FARM_MODELS": models, **env}, fresh=fresh, data_kib=data_kib
        )

    def supervisor(self, *arguments: str, **env: object) -> Process:
        """Start `farm worker` with these arguments, in a new interpreter."""
        return self._start("supervisor", "farm", ["worker", *arguments], env, fresh=True)

    def _start(
        self,
        name: str,
        module: str,
        arguments: list[str],
        env: dict[str, object],
        *,
        fresh: bool = False,
        data_kib: int | None = None,
    ) -> Process:
        log, variables = self._folder / f"{name}-{len(self._started)}.log", environment(self.settings, **env)
        popen: subprocess.Popen[bytes] | ForkedProcess
        if fresh:
            with log.open("wb") as stream:
                popen = subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    env=variables,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        else:
            popen = ForkedProcess(module, arguments, env=variables, stdout=log, data_kib=data_kib)
        self._started.append(Process(popen, log, name))
        return self._started[-1]

    @contextmanager
    def frozen(self, process: Process) -> Iterator[None]:
        """Stop a process with SIGSTOP, outside any transaction, until the block ends.

        SQLite has one writer: a process frozen inside a write transaction would block all others.
        """
        database = Database(self.settings.database_url)
        with database.write():
            process.popen.send_signal(signal.SIGSTOP)
            wait_until(lambda: _stopped(process.popen.pid), f"{process.name} is frozen")
        database.close()
        try:
            yield
        finally:
            process.popen.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Kill the processes that still run, and print the end of each log: pytest shows it if the test failed."""
        for process in self._started:
            if process.popen.poll() is None:
                process.kill()
            said = process.log.read_text(errors="replace").splitlines()
            print(f"--- {process.log.name}", *said[-60:], sep="\n")


def _stopped(pid: int) -> bool:
    """Whether SIGSTOP has stopped every thread of a process."""
    states = (stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat"))
    return all(state == "T" for state in states)


@pytest.fixture
def crew(settings: Settings, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """Starts dispatchers and workers, and kills them after the test."""
    measured_once = tmp_path_factory.getbasetemp() / "forwards.json"
    quick = {"lease_seconds": 5.0, "beat_seconds": 0.4, "forward_sizes": measured_once}
    crew = Crew(settings.model_copy(update=quick), tmp_path)
    yield crew
    crew.end()


@pytest.fixture
def farm(crew: Crew) -> Iterator[Farm]:
    """A client of the crew's farm."""
    with Farm(crew.settings) as farm:
        yield farm


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(settings: Settings, tmp_path: Path) -> Command:
    """Runs `farm ARGUMENTS…` in the test's folder; returns its exit status and output."""

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return run_forked("farm", *arguments, cwd=tmp_path, env=environment(settings, COLUMNS=200))

    return run

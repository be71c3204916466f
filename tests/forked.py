"""Processes of the farm, forked from one that has imported it.

A new interpreter imports torch, diffusers and Celery for seconds before a worker begins. These processes skip that:
each is forked from a process that has imported them and done nothing else, and then runs the same module with the same
arguments, environment and output as `python -m` would.
"""

import atexit
import contextlib
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

ROOT = Path(__file__).parents[1]


class ForkedProcess:
    """A process that runs `python -m module arguments`; has the attributes of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        *,
        env: Mapping[str, str],
        stdout: Path,
        stderr: Path | None = None,
        cwd: Path | None = None,
        data_kib: int | None = None,
    ) -> None:
        """Writes its output to files; without `stderr` both go to the first. It may take `data_kib` of memory."""
        stdout.touch()  # a process that is killed at once has not opened it
        self._process = _context().Process(
            target=_run, args=(module, list(arguments), dict(env), stdout, stderr, cwd or Path.cwd(), data_kib)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (status := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_forked(
    module: str, *arguments: str, env: Mapping[str, str], cwd: Path | None = None, timeout: float = 60
) -> "subprocess.CompletedProcess[str]":
    """Run a module to its end, as `subprocess.run` does with `capture_output` and `text`."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = ForkedProcess(module, arguments, env=env, stdout=stdout, stderr=stderr, cwd=cwd)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()  # in case it has not ended in time
        return subprocess.CompletedProcess([module, *arguments], status, stdout.read_text(), stderr.read_text())


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    with contextlib.chdir(ROOT):  # where `tests` is found
        forkserver.ensure_running()
    return context


def _run(
    module: str,
    arguments: list[str],
    env: dict[str, str],
    stdout: Path,
    stderr: Path | None,
    cwd: Path,
    data_kib: int | None,
) -> None:
    os.setsid()
    os.chdir(cwd)
    for path, numbers in ((stdout, (1, 2)), (stderr, (2,))):
        if path is not None:
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            for number in numbers:
                os.dup2(opened, number)
            os.close(opened)
    os.environ.clear()
    os.environ.update(env)
    if data_kib is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (1024 * data_kib, 1024 * data_kib))
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out before Python 3.13

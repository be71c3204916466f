"""Runs the workers of `farm worker --gpus` and `--workers`, and restarts them until a signal stops all."""

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, NoReturn

from farm.errors import AlreadyRunning, FarmError, NotConfigured, ServiceUnavailable
from farm.jobs.database import Database
from farm.runtime.backoff import Backoff
from farm.runtime.child_process import ChildProcess
from farm.runtime.stopping import stop_signals
from farm.runtime.supervisor import POLL_SECONDS, Fault, KeptProcess, Program, RestartPolicy, stop_all
from farm.runtime.terminal_text import printable
from farm.settings import Settings
from workers.service import gpus as driver

REFUSED = 2
"""The exit status of a worker that would end the same way again: settings, version, schema or model don't fit."""
RESTART_BACKOFF = Backoff(base_seconds=1.0, max_seconds=60.0)
LOOPING_FAULTS = 3
"""After so many ends in a row the log says that a worker does not come up."""
HEALTHY_SECONDS = 60.0
STOP_MARGIN_SECONDS = 15.0
"""How long a worker may take to stop beyond its drain."""
_LINE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Seat:
    """The name and the environment of one worker."""

    name: str
    env: Mapping[str, str] = field(default_factory=dict)


def seats(
    environ: Mapping[str, str], settings: Settings, name: str | None, *, gpus: str | None, workers: int | None
) -> list[Seat]:
    """The workers to run: one per GPU, or that many on the CPU. Raises `NotConfigured`."""
    if gpus is not None:
        if ":" in (settings.device or ""):
            raise NotConfigured(f"--gpus gives each worker its own GPU: leave out --device {settings.device}")
        found = driver.chosen(gpus, driver.here(environ))
        own = [(gpu.name, gpu.id) for gpu in found]
    elif workers is not None and workers >= 1:
        own = [(f"cpu{number}", "") for number in range(workers)]
    else:
        raise NotConfigured(f"--workers {workers}: at least one")
    threads = environ.get("OMP_NUM_THREADS", str(max(1, _cores() // len(own))))
    made = []
    for place, (called, gpu) in enumerate(own):
        env = {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": threads}
        if settings.device is None:
            # A worker whose torch can't use its GPU must fail, not render on the CPU.
            env["FARM_DEVICE"] = "cuda" if gpu else "cpu"
        if settings.metrics_port:
            env["FARM_METRICS_PORT"] = str(settings.metrics_port + place)
        made.append(Seat(f"{name}-{called}" if name else called, env))
    return made


def supervise(name: str | None, given: dict[str, Any], *, gpus: str | None, workers: int | None) -> NoReturn:
    """Run these workers until SIGTERM, SIGINT or SIGHUP drains them; a second signal kills them.

    `given` are the settings of the command line. Ends the process: with 0 after a signal, with 2 when it can't start
    or every worker was refused.
    """
    try:
        settings = Settings.load(**given)
        places = seats(os.environ, settings, name, gpus=gpus, workers=workers)
        _check(settings)
        with contextlib.ExitStack() as alone:
            for seat in places:
                alone.enter_context(_only_one(seat.name, settings))
            # -P: a folder `workers` in the current directory must not hide the package.
            command = [sys.executable, "-P", "-m", "workers", *(f"--{key}={value}" for key, value in given.items())]
            sys.exit(Crew(places, command, settings.drain_seconds + STOP_MARGIN_SECONDS).run())
    except FarmError as error:
        _say(f"farm worker: {error}")
        sys.exit(REFUSED)


def _check(settings: Settings) -> None:
    """Report a wrong schema once, instead of once per worker."""
    database = Database(settings.database_url)
    try:
        database.check_schema()
    except ServiceUnavailable as error:
        _say(f"farm worker: {error}; the workers will try again")
    finally:
        database.close()


class Crew:
    """The workers of one machine; each is started by `command` with `--name`."""

    def __init__(self, places: Sequence[Seat], command: Sequence[str], stop_seconds: float) -> None:
        policy = RestartPolicy(RESTART_BACKOFF.seconds, HEALTHY_SECONDS, _restarting, _refused)
        self._kept = [
            KeptProcess(Program(seat.name, partial(WorkerProcess, seat, command), stop_seconds), policy, _say)
            for seat in places
        ]
        self._stop = threading.Event()
        self._hurry = threading.Event()

    def run(self) -> int:
        """Keep them running, from the main thread; returns the exit status."""
        with stop_signals(self._stop, self._hurry):
            try:
                # One thread starts them all and lives as long as this process: they are killed when it ends.
                while not self._stop.is_set() and not all(kept.refused for kept in self._kept):
                    for kept in self._kept:
                        kept.tend()
                    self._stop.wait(POLL_SECONDS)
                if any(kept.lives for kept in self._kept):
                    _say("stopping: finishing or handing back renders; press Ctrl-C again to stop at once")
            finally:
                stop_all(self._kept, self._hurry, _say)
        if self._stop.is_set():
            return 0
        _say("farm worker: no worker can run here")
        return REFUSED


class WorkerProcess(ChildProcess):
    """A worker process; its output goes to standard error, each line prefixed with its name."""

    def __init__(self, seat: Seat, command: Sequence[str]) -> None:
        env = {**os.environ, **seat.env, "PYTHONUNBUFFERED": "1"}
        super().__init__([*command, "--name", seat.name], env=env, output=subprocess.PIPE)
        self.last_line = ""
        self._reader = threading.Thread(
            target=self._pass_on, args=[seat.name, self.output], name=f"log-{seat.name}", daemon=True
        )
        self._reader.start()

    def clear(self) -> None:
        """Kill the process if it still runs, and forward the rest of its output."""
        super().clear()
        self._reader.join(1)  # the pipe has ended, unless a stray child holds it

    def _pass_on(self, name: str, output: IO[bytes]) -> None:
        with output:
            while line := output.readline(_LINE_BYTES):
                text = line.decode(errors="replace").rstrip()
                self.last_line = text or self.last_line
                _say(text, name)


def _restarting(program: Program[WorkerProcess], fault: Fault[WorkerProcess], faults: int, delay: float) -> str:
    again = f"next start in {delay:.0f} s" if delay >= 1 else "starting again"
    loop = f" ({faults} times in a row: it does not come up)" if faults >= LOOPING_FAULTS else ""
    last_line = f": {fault.process.last_line}" if fault.process.last_line else ""
    return f"{program.name} {_ended(fault)}{loop}; {again}{last_line}"


def _refused(program: Program[WorkerProcess], fault: Fault[WorkerProcess]) -> str | None:
    if fault.status != REFUSED:
        return None
    return f"{program.name} {_ended(fault)} and is not started again: {fault.process.last_line or 'see above'}"


def _ended(fault: Fault[WorkerProcess]) -> str:
    status = fault.status or 0
    return f"was killed by signal {-status}" if status < 0 else f"ended with {status}"


_writing = threading.Lock()


def _say(text: str, name: str = "") -> None:
    """Write a whole line to standard error, without control characters that would steer a terminal."""
    clean = printable(text.expandtabs())
    with _writing, contextlib.suppress(OSError):  # its reader may be gone; the workers go on
        sys.stderr.write(f"{name} | {clean}\n" if name else f"{clean}\n")
        sys.stderr.flush()


@contextlib.contextmanager
def _only_one(name: str, settings: Settings) -> Iterator[None]:
    """Reserve a worker's name on this machine: a second worker of that name would take over the first one's jobs.

    The name is an abstract Unix socket (Linux only), which leaves no file and ends with its process.
    """
    if sys.platform != "linux":
        yield
        return
    farm = hashlib.sha256(settings.database_url.encode()).hexdigest()[:16]
    with socket.socket(socket.AF_UNIX) as held:
        try:
            held.bind(f"\0diffusion-farm/{farm}/{name}")
        except OSError:
            raise AlreadyRunning(
                f"a worker {name} of this farm runs on this machine already; another --name tells them apart"
            ) from None
        yield


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

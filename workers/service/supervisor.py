"""Several workers of one machine, each with a GPU of its own, and each kept running until all are told to stop."""

import contextlib
import hashlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NoReturn

from farm.errors import AlreadyRunning, FarmError, NotConfigured, ServiceUnavailable
from farm.jobs.database import Database
from farm.runtime.backoff import Backoff
from farm.runtime.stopping import stop_signals
from farm.runtime.terminal_text import printable
from farm.runtime.tethered import Tethered
from farm.settings import Settings
from workers.service import gpus as driver

REFUSED = 2
"""How a worker ends that would end the same way again: settings, version, schema or model don't fit."""
PATIENCE = Backoff(base_seconds=1.0, max_seconds=60.0)
LOOPING_DEATHS = 3
"""From so many deaths in a row on it is said that a worker does not come up."""
HEALTHY_SECONDS = 60.0
"""After so long a worker's earlier deaths are forgiven."""
STOP_MARGIN_SECONDS = 15.0
"""How long a worker may take to stop beyond its drain."""
POLL_SECONDS = 0.1
_LINE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Seat:
    """What one worker has for itself."""

    name: str
    env: Mapping[str, str] = field(default_factory=dict)


def seats(
    environ: Mapping[str, str], settings: Settings, name: str | None, *, gpus: str | None, workers: int | None
) -> list[Seat]:
    """The workers to run: one for each of these GPUs, or so many on the CPU. Raises `NotConfigured`."""
    if gpus is not None:
        if ":" in (settings.device or ""):
            raise NotConfigured(f"each worker sees one GPU alone, so {settings.device} is none: leave the device out")
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
            # It is for the worker to say so if its torch can't use the GPU, and not to render on the CPU unasked.
            env["FARM_DEVICE"] = "cuda" if gpu else "cpu"
        if settings.metrics_port:
            env["FARM_METRICS_PORT"] = str(settings.metrics_port + place)
        made.append(Seat(f"{name}-{called}" if name else called, env))
    return made


def supervise(name: str | None, given: dict[str, Any], *, gpus: str | None, workers: int | None) -> NoReturn:
    """Run these workers until SIGTERM, SIGINT or SIGHUP drains them; a second one ends them at once.

    `given` are the settings that the command line names. Ends the process: with 0 when it was told to stop, with 2
    when it can't start, or when every worker was refused.
    """
    try:
        settings = Settings.load(**given)
        places = seats(os.environ, settings, name, gpus=gpus, workers=workers)
        _check(settings)
        with contextlib.ExitStack() as alone:
            for seat in places:
                alone.enter_context(_only_one(seat.name, settings))
            # -P: a folder called `workers` where somebody stands must not be taken for ours.
            command = [sys.executable, "-P", "-m", "workers", *(f"--{key}={value}" for key, value in given.items())]
            sys.exit(Crew(places, command, settings.drain_seconds + STOP_MARGIN_SECONDS).run())
    except FarmError as error:
        _say(f"farm worker: {error}")
        sys.exit(REFUSED)


def _check(settings: Settings) -> None:
    """Refuse a schema that doesn't fit in one line, and not in one for each worker."""
    database = Database(settings.database_url)
    try:
        database.check_schema()
    except ServiceUnavailable as error:
        _say(f"farm worker: {error}; the workers will try again")
    finally:
        database.close()


class Crew:
    """The workers of one machine; `command` and `--name` start one."""

    def __init__(self, places: Sequence[Seat], command: Sequence[str], stop_seconds: float) -> None:
        self._posts = [Post(seat, command) for seat in places]
        self._stop_seconds = stop_seconds
        self._stop = threading.Event()
        self._hurry = threading.Event()

    def run(self) -> int:
        """Keep them running, from the main thread; returns the exit status."""
        with stop_signals(self._stop, self._hurry):
            try:
                # One thread starts them all and lives as long as this process: the tether holds them to it.
                while not self._stop.is_set() and not all(post.refused for post in self._posts):
                    for post in self._posts:
                        post.tend()
                    self._stop.wait(POLL_SECONDS)
                self._drain()
            finally:
                for post in self._posts:
                    post.end()
        if self._stop.is_set():
            return 0
        _say("farm worker: no worker can run here")
        return REFUSED

    def _drain(self) -> None:
        living = [post for post in self._posts if post.ask_to_stop()]
        if living:
            _say("stopping: what renders is finished or handed back; once more to stop at once")
        asked = time.monotonic()
        while living and not self._hurry.wait(POLL_SECONDS):
            living = [post for post in living if post.lives]
            if living and time.monotonic() - asked > self._stop_seconds:
                for post in living:
                    _say(f"{post.name} did not stop in {self._stop_seconds:.0f} s: killed")
                return


class Post:
    """One worker that is kept running: its present process, or when the next one starts."""

    def __init__(self, seat: Seat, command: Sequence[str]) -> None:
        self.name = seat.name
        self.refused = False
        self._command = [*command, "--name", seat.name]
        self._env = {**os.environ, **seat.env, "PYTHONUNBUFFERED": "1"}
        self._process: Tethered | None = None
        self._reader: threading.Thread | None = None
        self._last_line = ""
        self._started = 0.0
        self._start_at = 0.0
        self._deaths = 0

    @property
    def lives(self) -> bool:
        """Whether its process runs."""
        return self._process is not None and self._process.ended() is None

    def tend(self) -> None:
        """Notice a death, and start again when the time has come. Called every 0.1 s."""
        now = time.monotonic()
        if self._process is None:
            if not self.refused and now >= self._start_at:
                self._start()
        elif (status := self._process.ended()) is not None:
            self.end()
            self._mourn(status, now)

    def ask_to_stop(self) -> bool:
        """Let it drain; whether there was anybody to ask."""
        if self._process is None or not self.lives:
            return False
        self._process.ask_to_stop()
        return True

    def end(self) -> None:
        """Kill what is left of its process."""
        if self._process is not None:
            self._process.clear()
            self._process = None
        if self._reader is not None:
            self._reader.join(1)  # the pipe has ended, unless a stray child holds it
            self._reader = None

    def _start(self) -> None:
        self._started, self._last_line = time.monotonic(), ""
        self._process = Tethered(self._command, env=self._env, output=-1)
        self._reader = threading.Thread(
            target=self._pass_on, args=[self._process.output], name=f"log-{self.name}", daemon=True
        )
        self._reader.start()

    def _mourn(self, status: int, now: float) -> None:
        how = f"was killed by signal {-status}" if status < 0 else f"ended with {status}"
        if status == REFUSED:
            self.refused = True
            _say(f"{self.name} {how} and is not started again: {self._last_line or 'see above'}")
            return
        if now - self._started > HEALTHY_SECONDS:
            self._deaths = 0
        self._deaths += 1
        delay = PATIENCE.seconds(self._deaths)
        self._start_at = now + delay
        again = f"next start in {delay:.0f} s" if delay >= 1 else "starting again"
        loop = f" ({self._deaths} times in a row: it does not come up)" if self._deaths >= LOOPING_DEATHS else ""
        _say(f"{self.name} {how}{loop}; {again}{f': {self._last_line}' if self._last_line else ''}")

    def _pass_on(self, output: IO[bytes]) -> None:
        with output:
            while line := output.readline(_LINE_BYTES):
                text = line.decode(errors="replace").rstrip()
                self._last_line = text or self._last_line
                _say(text, self.name)


_mouth = threading.Lock()


def _say(text: str, who: str = "") -> None:
    """A whole line on standard error, whoever else writes; without what a terminal would take for a command."""
    clean = printable(text.expandtabs())
    with _mouth, contextlib.suppress(OSError):  # who read it may be gone; the workers go on
        sys.stderr.write(f"{who} | {clean}\n" if who else f"{clean}\n")
        sys.stderr.flush()


@contextlib.contextmanager
def _only_one(name: str, settings: Settings) -> Iterator[None]:
    """Hold a worker's name on this machine: a second of that name would take the first one's jobs away.

    As a name in the kernel that leaves no file and goes with its holder; Linux alone has those.
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

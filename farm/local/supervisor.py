"""Starts the parts of the embedded farm, restarts what dies, and stops all of it."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from rich.console import Console
from rich.table import Table
from rich.text import Text

from farm.db import Database
from farm.errors import PartFailed
from farm.jobs import JobStore
from farm.local import parts as make
from farm.local.home import Home
from farm.local.parts import Part
from farm.local.process import Process, end_leftovers, rotate_log
from farm.settings import Settings

POLL_SECONDS = 0.1
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.5, 15.0
HEALTHY_SECONDS = 30.0
"""After so long a part's earlier deaths are forgiven, and a restart is quick again."""


class _Kept:
    """A part that is kept running: its present process, and when to start the next one."""

    def __init__(self, part: Part, home: Home, console: Console) -> None:
        self.part = part
        self.ready = False
        self.process: Process | None = None
        self._home = home
        self._console = console
        self._deaths = 0
        self._start_at = 0.0

    def start(self) -> None:
        self.ready = False
        self.process = Process(self.part, self._home)

    def check(self) -> None:
        """See whether a process that comes up answers; raises `PartFailed` if it died or takes too long."""
        process = self.process
        if process is None or self.ready:
            return
        status = process.ended()
        if status is None:
            if self.part.answers(process.started_at):
                self.ready = True
            elif time.monotonic() - process.started > self.part.ready_seconds:
                raise PartFailed(self._obituary(f"does not answer after {self.part.ready_seconds:.0f} s", process))
            return
        raise PartFailed(self._obituary(f"ended while it came up ({_told(status)})", process))

    def tend(self) -> None:
        """Notice a death, and start again when its time has come."""
        if self.process is None:
            if time.monotonic() >= self._start_at:
                self.start()
            return
        status = self.process.ended()
        if status is not None:
            self._restart_later(f"died ({_told(status)})")
            return
        self.process.bound_log()
        if self.ready:
            if self._deaths and time.monotonic() - self.process.started > HEALTHY_SECONDS:
                self._deaths = 0
        elif self.part.answers(self.process.started_at):
            self.ready = True
            self._console.print(f"{self.part.name} is back")
        elif time.monotonic() - self.process.started > self.part.ready_seconds:
            self._restart_later(f"does not answer after {self.part.ready_seconds:.0f} s")

    def end(self) -> None:
        """Kill what is left of the process."""
        if self.process is not None:
            self.process.clear()
            self.process = None

    def _restart_later(self, why: str) -> None:
        assert self.process is not None  # noqa: S101
        delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2**self._deaths)
        self._deaths += 1
        self._console.print(Text(self._obituary(f"{why}, restarting in {delay:g} s", self.process)))
        self._start_at = time.monotonic() + delay
        self.ready = False
        self.end()

    def _obituary(self, what: str, process: Process) -> str:
        lines = process.last_lines()
        said = "".join(f"\n  | {line}" for line in lines) or " (it wrote nothing)"
        return f"{self.part.name} {what}; {self._home.logs / self.part.name}.log ends with:{said}"


class LocalFarm:
    """The embedded farm in a folder: real servers from wheels, SQLite, dispatcher, workers and Flower.

    `start` returns when every part answers; `stop` drains the workers and leaves no process behind. State, ports and
    credentials are kept in the folder. As a context manager it starts and stops; `run` is `farm up`.
    One thread starts, watches and stops all parts, so no two hands are ever on one of them.
    """

    def __init__(
        self,
        home: Path,
        workers: int = 1,
        *,
        dispatcher: bool = True,
        flower: bool = True,
        console: Console | None = None,
    ) -> None:
        self.home = Home(home)
        self._workers = workers
        self._dispatcher = dispatcher
        self._flower = flower
        self._console = console or Console(stderr=True)
        self._keeper: threading.Thread | None = None
        self._up = threading.Event()
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._over = threading.Event()
        self._failure: BaseException | None = None
        self._kept: list[_Kept] = []
        self._servers: list[_Kept] = []
        self._settings: Settings | None = None

    @property
    def settings(self) -> Settings:
        """How to reach this farm, whatever services the environment names."""
        if self._settings is None:
            raise PartFailed("the embedded farm has not been started")
        return self._settings

    def start(self) -> None:
        """Start every part and wait until each answers.

        Raises `AlreadyRunning` when a farm runs in this home, `NotConfigured` when packages are missing, and
        `PartFailed`, with its last lines and everything stopped again, when a part does not come up.
        """
        make.require(worker=self._workers > 0, flower=self._flower)
        self.home.take()
        self._keeper = threading.Thread(target=self._keep, name="farm-keeper", daemon=True)
        try:
            self._keeper.start()
            with self._console.status("starting …") as status:
                while not (self._up.wait(POLL_SECONDS) or self._over.is_set()):
                    status.update(f"starting {', '.join(self._awaited()) or '…'}")
            if self._over.is_set() and self._failure is not None:
                raise self._failure
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Drain and stop every part; does nothing when nothing runs."""
        self._stop.set()
        if self._keeper is not None:
            self._keeper.join()
            self._keeper = None
        self.home.release()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the farm is over; False when it still runs after that time."""
        return self._over.wait(seconds)

    def run(self) -> None:
        """Start, show what runs where, and stop when SIGINT, SIGTERM or SIGHUP comes; a second one stops at once.

        Call it from the main thread. Raises what `start` raises.
        """
        with self._signals():
            self.start()
            try:
                if not self._stop.is_set():
                    self._console.print(self.table())
                    self._console.print("Ctrl-C stops the farm; its state stays.")
                # Short waits: a signal is handled only between them.
                while not self._stop.is_set() and not self.wait(0.5):
                    pass
            finally:
                self._console.print("stopping; renders are finished or handed back …")
                self.stop()
                self._console.print(f"stopped; everything is kept in {self.home.path}")
        if self._failure is not None:
            raise self._failure

    def table(self) -> Table:
        """What runs where, and how a person gets in."""
        table = Table("part", "where", "process", title=f"farm in {self.home.path}", title_justify="left")
        for column in table.columns:
            column.overflow = "fold"  # an address cut short is none
        table.add_row("SQL (SQLite)", f"{self.home.path / 'farm.db'}")
        for kept in self._kept:
            table.add_row(kept.part.shown, Text(kept.part.address), str(kept.process.pid) if kept.process else "")
        return table

    def pids(self) -> dict[str, int]:
        """The process id of each part that runs now."""
        return {kept.part.name: process.pid for kept in self._kept if (process := kept.process) is not None}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- the keeper's thread --------------------------------------------------------------------------------

    def _keep(self) -> None:
        try:
            self._bring_up()
            self._up.set()
            while not self._stop.wait(POLL_SECONDS):
                for kept in self._kept:
                    kept.tend()
        except BaseException as error:  # noqa: BLE001  (the thread that waits raises it)
            self._failure = error
        finally:
            self._take_down()
            self._over.set()

    def _bring_up(self) -> None:
        for name in end_leftovers(self.home):
            self._console.print(f"ended {name}, left over from a farm that was killed")
        access = self.home.access()
        self.home.save(access)
        self._settings = settings = self.home.settings(access)
        database = Database(settings.database_url)
        database.migrate()
        store = JobStore(database, settings)
        self._servers = [self._new(part(self.home, access, settings)) for part in (make.valkey, make.seaweed)]
        self._start(self._servers)
        if self._stop.is_set():
            return
        users = [make.dispatcher(self.home, access, settings)] if self._dispatcher else []
        users += [
            make.worker(self.home, access, settings, number, self._workers, store)
            for number in range(1, self._workers + 1)
        ]
        users += [make.flower(self.home, access, settings)] if self._flower else []
        self._start([self._new(part) for part in users])

    def _new(self, part: Part) -> _Kept:
        return _Kept(part, self.home, self._console)

    def _start(self, group: Sequence[_Kept]) -> None:
        for kept in group:
            rotate_log(self.home, kept.part.name)
            self._kept.append(kept)
            kept.start()
        while not all(kept.ready for kept in group) and not self._stop.wait(POLL_SECONDS):
            for kept in self._kept:
                if kept in group:
                    kept.check()
                else:
                    kept.tend()

    def _take_down(self) -> None:
        # Servers last: whoever drains still needs them.
        _end([kept for kept in self._kept if kept not in self._servers], self._hurry, self._console)
        _end(self._servers, self._hurry, self._console)

    def _awaited(self) -> Iterable[str]:
        return [kept.part.name for kept in list(self._kept) if not kept.ready]

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(_number: int, _frame: FrameType | None) -> None:
            if self._stop.is_set():
                self._hurry.set()
            self._stop.set()

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _end(group: Sequence[_Kept], hurry: threading.Event, console: Console) -> None:
    """Ask these parts to stop, all at once; kill who takes longer than it may, or everybody when it gets urgent."""
    living = {kept: kept.process for kept in group if kept.process is not None}
    for process in living.values():
        process.ask_to_stop()
    asked = time.monotonic()
    while living and not hurry.wait(POLL_SECONDS / 2):
        for kept, process in list(living.items()):
            late = time.monotonic() - asked > kept.part.stop_seconds
            if late:
                console.print(f"{kept.part.name} did not stop in {kept.part.stop_seconds:.0f} s: killed")
            if late or process.ended() is not None:
                del living[kept]
                kept.end()
    for kept in living:
        kept.end()


def _told(status: int) -> str:
    return f"exit {status}"

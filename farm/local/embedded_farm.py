"""The embedded farm: starts its parts in order, keeps them running, drains and stops them."""

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.table import Table
from rich.text import Text

from farm.errors import NotConfigured, PartFailed
from farm.jobs.database import Database
from farm.jobs.workers import Workers
from farm.local import parts
from farm.local.home import Home
from farm.local.kept_part import KeptPart, explained
from farm.local.process import end_leftovers, rotate_log
from farm.runtime.stopping import stop_signals
from farm.runtime.supervisor import POLL_SECONDS, stop_all
from farm.settings import EMBEDDED_FILE, Settings, variables_naming_a_farm


class LocalFarm:
    """The embedded farm in a folder: servers from wheels, SQLite, dispatcher, workers and Flower.

    `start` returns when every part answers; `stop` drains the workers and leaves no process behind. State, ports and
    credentials stay in the folder. As a context manager it starts and stops; `run` is `farm up`. An object can be
    started once.
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
        self._settings: Settings | None = None
        self._servers: list[KeptPart] = []
        self._users: list[KeptPart] = []
        # One thread starts, watches and ends all processes, so no locks are needed. It lives as long as the farm:
        # the kernel kills a process when the thread that started it ends.
        self._keeper: threading.Thread | None = None
        self._up = threading.Event()
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._over = threading.Event()
        self._failure: BaseException | None = None

    @property
    def settings(self) -> Settings:
        """The settings of this farm, regardless of the environment."""
        if self._settings is None:
            raise NotConfigured("the embedded farm has not been started")
        return self._settings

    def start(self) -> None:
        """Start every part and wait until each answers.

        Raises `AlreadyRunning` if a farm runs in this home, `NotConfigured` if packages are missing, and `PartFailed`
        with the part's last lines if a part does not come up; every part is then stopped.
        """
        parts.require(worker=self._workers > 0, flower=self._flower)
        self.home.take()
        self._keeper = threading.Thread(target=self._keep, name="farm-keeper", daemon=True)
        try:
            self._keeper.start()
            with self._console.status("starting …") as status:
                while not (self._up.wait(POLL_SECONDS) or self._over.is_set()):
                    awaited = [kept.part.name for kept in self._kept if not kept.ready]
                    status.update(f"starting {', '.join(awaited)} …")
            if self._failure is not None:
                raise self._failure
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Drain and stop every part; does nothing if the farm is not running."""
        self._stop.set()
        if self._keeper is not None:
            self._keeper.join()
            self._keeper = None
        self.home.release()

    def kill(self) -> None:
        """Stop every part at once, without a drain: other workers render its jobs after their leases expire."""
        self._hurry.set()
        self.stop()

    def run(self) -> None:
        """Start, print the parts, and stop at SIGINT, SIGTERM or SIGHUP; a second signal kills the remaining processes.

        Call it from the main thread. Raises what `start` raises.
        """
        with stop_signals(self._stop, self._hurry):
            try:
                self._say(f"starting the farm in {self.home.path}")
                self.start()
                if not self._stop.is_set():
                    with contextlib.suppress(OSError):
                        self._console.print(self.table())
                    self._warn_of_environment()
                    self._say("Ctrl-C stops the farm; everything in it is kept.")
                while not (self._stop.wait(0.5) or self._over.is_set()):
                    pass
            finally:
                if self._keeper is not None:
                    self._say("stopping: finishing or handing back renders …")
                    self.stop()
                    self._say(f"stopped; everything is kept in {self.home.path}")
        if self._failure is not None:
            raise self._failure

    def table(self) -> Table:
        """The parts with their addresses, logins and process ids."""
        table = Table("part", "where", "process", title=f"farm in {self.home.path}", title_justify="left")
        for column in table.columns:
            column.overflow = "fold"  # a truncated address is useless
        table.add_row("SQL (SQLite)", Text(f"{self.home.path / 'farm.db'}"))
        for kept in self._kept:
            pid = str(kept.process.pid) if kept.process else ""
            login = kept.part.login
            if login and not self._console.is_terminal:
                login = f"user and password in {self.home.path / EMBEDDED_FILE}"
            table.add_row(kept.part.shown, Text("\n".join(filter(None, (kept.part.address, login)))), pid)
        return table

    def pids(self) -> dict[str, int]:
        """The process id of each running part."""
        return {kept.part.name: process.pid for kept in self._kept if (process := kept.process) is not None}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _kept(self) -> list[KeptPart]:
        return [*self._servers, *self._users]

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone, but the parts must still be stopped
            self._console.print(Text(text), soft_wrap=True)

    def _warn_of_environment(self) -> None:
        named = variables_naming_a_farm()
        if named:
            self._say(f"warning: {', '.join(named)} set: commands with that environment don't use this farm")

    # --- the keeper's thread --------------------------------------------------------------------------------

    def _keep(self) -> None:
        undo = contextlib.ExitStack()
        try:
            self._bring_up(undo)
            self._up.set()
            while not self._stop.wait(POLL_SECONDS):
                for kept in self._kept:
                    kept.tend()
        except BaseException as error:  # noqa: BLE001  (`start` and `run` raise it)
            self._failure = error
        finally:
            # Servers last: the workers need them while they drain.
            stop_all(self._users, self._hurry, self._say)
            stop_all(self._servers, self._hurry, self._say)
            undo.close()
            self._over.set()

    def _bring_up(self, undo: contextlib.ExitStack) -> None:
        for name in end_leftovers(self.home):
            self._say(f"ended {name}, left over from a farm that was killed")
        access = self.home.access()
        self.home.save(access)
        self._settings = settings = self.home.settings(access)
        database = Database(settings.database_url)
        undo.callback(database.close)
        database.migrate()
        self._start(
            self._servers, [parts.valkey(self.home, access, settings), parts.seaweed(self.home, access, settings)]
        )
        users = [parts.dispatcher(self.home, settings)] if self._dispatcher else []
        workers = Workers(database, settings)
        users += [
            parts.worker(self.home, settings, number, self._workers, workers) for number in range(1, self._workers + 1)
        ]
        if self._flower:
            users.append(parts.flower(self.home, access))
        self._start(self._users, users)

    def _start(self, group: list[KeptPart], made: Sequence[parts.Part]) -> None:
        for part in made:
            if self._stop.is_set():
                return
            rotate_log(self.home, part.name)
            kept = KeptPart(part, self.home, self._say)
            kept.start()
            group.append(kept)
        while not all(kept.ready for kept in group) and not self._stop.wait(POLL_SECONDS):
            for kept in group:
                if (fault := kept.fault()) is not None:
                    raise PartFailed("; ".join(explained(kept.program, fault)))
            if group is not self._servers:
                for kept in self._servers:
                    kept.tend()

"""The process of a part: logs its output, and finds leftover processes of a killed farm."""

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from farm.local.home import Home
from farm.runtime.atomic_files import write_atomic
from farm.runtime.child_process import ChildProcess
from farm.runtime.terminal_text import printable

LOG_BYTES = 16 * 2**20
_SAME_SECONDS = 1.5
"""The tolerance for a process's start time: it is computed from the boot time, in seconds, which follows the clock."""


class PartProcess(ChildProcess):
    """A process of a part; each start of the part creates a new object."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        home: Home,
        env: Mapping[str, str],
        cwd: Path | None = None,
        litter: Sequence[Path] = (),
    ) -> None:
        """Start it. `litter`: files outside the home that it leaves behind when it is killed."""
        self.log = home.logs / f"{name}.log"
        self.started_at = datetime.now(UTC)
        self._pid_file = home.run / f"{name}.pid"
        self._litter = litter
        self._remove_litter()
        with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as log:
            self._log_start = log.tell()
            super().__init__(command, env=env, output=log, cwd=cwd)
        _remember(self._pid_file, self.pid)

    def clear(self) -> None:
        """Kill the rest of its process group, and delete its pid file and its litter."""
        super().clear()
        self._pid_file.unlink(missing_ok=True)
        self._remove_litter()

    def _remove_litter(self) -> None:
        for path in self._litter:
            path.unlink(missing_ok=True)

    def written(self) -> bytes:
        """Its output since its start."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read()

    def last_lines(self, count: int = 10) -> list[str]:
        """The end of its output, without control characters."""
        lines = self.written()[-16_384:].decode(errors="replace").expandtabs().splitlines()
        return [printable(line) for line in lines if line.strip()][-count:]

    def bound_log(self) -> None:
        """Rotate its log if it is longer than `LOG_BYTES`."""
        if self.log.stat().st_size > LOG_BYTES:
            shutil.copyfile(self.log, self.log.with_suffix(".log.1"))
            os.truncate(self.log, 0)
            self._log_start = 0


def rotate_log(home: Home, name: str) -> None:
    """Rotate the log of the last run."""
    log = home.logs / f"{name}.log"
    if log.exists() and log.stat().st_size:
        log.replace(log.with_suffix(".log.1"))


def end_leftovers(home: Home) -> list[str]:
    """Kill the processes that a killed farm left running in this home; returns the parts' names.

    A process is a part if its id and its start time match the recorded ones, because the kernel reuses ids.
    """
    import psutil

    found = []
    for pid_file in sorted(home.run.glob("*.pid")):
        with contextlib.suppress(ValueError, KeyError, psutil.Error):
            recorded = json.loads(pid_file.read_text(encoding="utf-8"))
            process = psutil.Process(recorded["pid"])
            if abs(process.create_time() - recorded["create_time"]) < _SAME_SECONDS:
                found.append(pid_file.stem)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
        pid_file.unlink(missing_ok=True)
    return found


def _remember(pid_file: Path, pid: int) -> None:
    import psutil

    with contextlib.suppress(psutil.Error):  # it may have ended already
        record = {"pid": pid, "create_time": psutil.Process(pid).create_time()}
        write_atomic(pid_file, json.dumps(record) + "\n", private=True)

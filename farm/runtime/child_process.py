"""A child process that ends with its parent, together with its own children."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_LAUNCHER = Path(__file__).with_name("die_with_parent.py")


class ChildProcess:
    """A running command in its own session: Ctrl-C reaches only the parent, which stops it in order.

    Create it in a thread that lives as long as the process should: on Linux it is killed when that thread ends.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], output: IO[bytes] | int, cwd: Path | None = None
    ) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd=cwd,
            umask=0o077,
            start_new_session=True,
        )
        self.pid = self._popen.pid

    @property
    def output(self) -> IO[bytes] | None:
        """The pipe with its output, if it was started with a pipe."""
        return self._popen.stdout

    def ended(self) -> int | None:
        """The exit status (negative: the signal), or None while it runs."""
        if self._popen.returncode is not None:
            return self._popen.returncode
        # It stays a zombie until `clear`, so that its id, which is also its group's id, is not reused.
        end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end is None:
            return None
        return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status

    def ask_to_stop(self) -> None:
        """Send SIGTERM."""
        if self.ended() is None:
            os.kill(self.pid, signal.SIGTERM)

    def clear(self) -> None:
        """Kill the rest of its process group."""
        if self._popen.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._popen.wait()

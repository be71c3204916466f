"""Becomes a command that dies with whoever started it: `tether.py PARENT_PID PROGRAM ARGUMENTS…`.

A farm that is killed with -9 can't stop its parts; on Linux the kernel does it then. This runs between fork and
exec instead of Python code in the forked supervisor (`preexec_fn`), which deadlocks in a program with threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent and become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the tether held
        sys.exit("the farm that started this is gone")
    os.execv(command[0], command)  # noqa: S606  (the point of it)


if __name__ == "__main__":
    main()

"""Executes a command that is killed when its parent dies: `die_with_parent.py PARENT_PID PROGRAM ARGUMENTS…`.

A farm that is killed with SIGKILL cannot stop its parts; on Linux the kernel does. This runs between fork and exec, and
replaces Python code in the forked supervisor (`preexec_fn`), which deadlocks in a program with threads.
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
    if os.getppid() != parent:  # it died before prctl
        sys.exit("the farm that started this is gone")
    os.execv(command[0], command)  # noqa: S606  (its purpose)


if __name__ == "__main__":
    main()

"""A private Docker engine for the tests: its images, containers and network are its own and are deleted with it.

It runs in a network namespace from which only its own containers can be reached, and in which they publish their ports.
A process in this namespace, but in no container, acts as a user outside the farm on the same machine.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PROGRAMS = {
    "dockerd": "docker.io",
    "docker": "docker.io",
    "docker-compose": "docker-compose",
    "debootstrap": "debootstrap",
    "ip": "iproute2",
}
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
"""Debian's program folders only: another Docker client on this machine may be incompatible with Debian's engine."""

_began = time.monotonic()


def say(text: str) -> None:
    """Print a line of progress with the seconds since the start."""
    print(f"[{time.monotonic() - _began:4.0f} s] {text}", file=sys.__stderr__, flush=True)


def lacking() -> str | None:
    """The reason why no engine can run here; None if one can."""
    packages = {package for program, package in PROGRAMS.items() if shutil.which(program, path=PATH) is None}
    if packages:
        return f"no {', '.join(sorted(packages))}: infra/compose-test-packages installs what Debian has of it"
    return None if os.geteuid() == 0 else "only root can run a Docker engine"


class Engine:
    """`dockerd` in its own namespace and folder."""

    def __init__(self) -> None:
        self.name = f"farm-compose-{os.getpid()}"
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir="/tmp"))
        self.env = {
            "PATH": PATH,
            "HOME": str(self.folder),
            "DOCKER_HOST": f"unix://{self.folder}/docker.sock",
            "DOCKER_BUILDKIT": "1",
            "COMPOSE_DOCKER_CLI_BUILD": "1",
            "BUILDKIT_PROGRESS": "plain",
        }
        self._dockerd: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Create the namespace, start the engine in it, and wait until it answers."""
        self._root("ip", "netns", "add", self.name)
        self._root("ip", "-n", self.name, "link", "set", "lo", "up")
        (self.folder / "daemon.json").write_text("{}")
        with (self.folder / "dockerd.log").open("wb") as log:
            self._dockerd = subprocess.Popen(
                self.outside(
                    "dockerd",
                    f"--config-file={self.folder}/daemon.json",
                    f"--data-root={self.folder}/data",
                    f"--exec-root={self.folder}/exec",
                    f"--pidfile={self.folder}/dockerd.pid",
                    f"--host=unix://{self.folder}/docker.sock",
                    f"--containerd-namespace={self.name}",
                    f"--containerd-plugins-namespace={self.name}-plugins",
                ),
                env={**self.env, "TMPDIR": str(self.folder)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while subprocess.run(["docker", "version"], env=self.env, capture_output=True, check=False).returncode:
            if self._dockerd.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"dockerd does not answer: {(self.folder / 'dockerd.log').read_text()[-4000:]}")
            time.sleep(0.1)
        say("the private Docker engine runs")

    def stop(self) -> None:
        """Stop the engine and delete its mounts, namespace and folder."""
        if self._dockerd is not None and self._dockerd.poll() is None:
            self._dockerd.send_signal(signal.SIGTERM)
            try:
                self._dockerd.wait(60)
            except subprocess.TimeoutExpired:
                self._dockerd.kill()
                self._dockerd.wait()
            say("the Docker engine has ended")
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            where = line.split()[1]
            if where.startswith(f"{self.folder}/"):
                subprocess.run(["umount", "--lazy", where], check=False)
        subprocess.run(["ip", "netns", "delete", self.name], env=self.env, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
        say("deleted the Docker engine's namespace and folder")

    def outside(self, *command: str | Path) -> list[str]:
        """The arguments that run a command in the engine's network namespace, but in no container."""
        return ["nsenter", f"--net=/run/netns/{self.name}", "--", *map(str, command)]

    def docker(self, *arguments: str | Path, stdin: Path | None = None) -> str:
        """Run a Docker command and return its output; raises with its output if it fails."""
        return run(["docker", *map(str, arguments)], self.env, stdin=stdin)

    def _root(self, *command: str) -> None:
        run(command, self.env)


def run(
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    cwd: Path | None = None,
    stdin: Path | None = None,
    seconds: float = 900,
) -> str:
    """Run a command and return its output; raises with its output if it fails."""
    with (stdin or Path(os.devnull)).open("rb") as given:
        done = subprocess.run(
            command, env=env, cwd=cwd, stdin=given, capture_output=True, text=True, check=False, timeout=seconds
        )
    if done.returncode:
        said = f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        raise RuntimeError(f"{' '.join(command[:8])} … ended with {done.returncode}:\n{said}")
    return done.stdout

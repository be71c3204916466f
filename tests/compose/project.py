"""docker-compose.yml as a project of the test's engine, and access to its farm from outside."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.compose.engine import Engine, run, say
from tests.compose.images import BASE, ROOT, STAND_INS

PORTS = {"POSTGRES_PORT": "15432", "REDIS_PORT": "16379", "S3_PORT": "18333", "FLOWER_PORT": "15555"}
"""Other ports than the defaults, to check that the settings apply; no other program uses the engine's network."""
PROMETHEUS_PORT = "19090"


class Project:
    """A docker-compose project with generated secrets."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        self.name = "farmtest"
        self.folder = folder
        self._env_file = folder / "compose.env"
        secrets = run([str(ROOT / "infra" / "compose" / "new-env")], engine.env)
        given = {
            **PORTS,
            "PROMETHEUS_PORT": PROMETHEUS_PORT,
            "FARM_S3_PUBLIC_ENDPOINT_URL": f"http://127.0.0.1:{PORTS['S3_PORT']}",
            "FARM_LEASE_SECONDS": "5",
            "FARM_SLOTS": "4",
            "OMP_NUM_THREADS": "1",
            "BASE_IMAGE": BASE,
            "PIP_NO_INDEX": "1",
            **{f"{name.upper()}_IMAGE": image for name, image in STAND_INS.items()},
        }
        self._env_file.touch(mode=0o600)
        self._env_file.write_text(secrets + "".join(f"{name}={value}\n" for name, value in given.items()))
        self.secrets = dict(line.split("=", 1) for line in self._env_file.read_text().splitlines() if "=" in line[:40])
        self.env: dict[str, str] = {}

    def compose(self, *arguments: str, seconds: float = 900) -> str:
        """Run a docker-compose command and return its output; raises with its output if it fails."""
        whole = ["docker-compose", "--project-name", self.name, "--env-file", str(self._env_file), *arguments]
        return run(whole, self.engine.env, cwd=ROOT, seconds=seconds)

    def join(self) -> None:
        """Set `env` to the settings that the farm's `env` service prints for outside users."""
        said = self.compose("run", "--rm", "-T", "env")
        self.env = {
            "PATH": self.engine.env["PATH"],
            "HOME": str(self.folder),
            "COLUMNS": "200",
            "FARM_OWNER": "outside",
            **dict(shlex.split(line)[0].split("=", 1) for line in said.splitlines()),
        }

    def outside(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command outside the containers, where it can reach only their published ports."""
        done = subprocess.run(
            self.engine.outside(*command),
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done

    def farm(self, *arguments: str | Path) -> Any:
        """Run a farm command outside the containers and return its JSON output."""
        return json.loads(self.outside(sys.executable, "-m", "farm", *arguments, "--json").stdout)

    def fetch(self, url: str, login: str = "") -> tuple[int, str]:
        """Status and body of a page, fetched outside the containers; status 0 if no server answers."""
        script = (
            "import base64, sys, urllib.error, urllib.request as u\n"
            "request = u.Request(sys.argv[1])\n"
            "login = sys.stdin.read()\n"
            "if login: request.add_header('Authorization', 'Basic ' + base64.b64encode(login.encode()).decode())\n"
            "try: answer = u.urlopen(request, timeout=20)\n"
            "except urllib.error.HTTPError as error: answer = error\n"
            "except OSError: sys.exit(print(0))\n"
            "print(answer.status, flush=True); sys.stdout.buffer.write(answer.read())\n"
        )
        done = subprocess.run(
            self.engine.outside(sys.executable, "-c", script, url),
            input=login.encode(),
            capture_output=True,
            check=True,
            timeout=60,
        )
        status, _, body = done.stdout.partition(b"\n")
        return int(status), body.decode("latin-1")

    def containers(self, service: str | None = None) -> list[dict[str, Any]]:
        """`docker inspect` of the project's containers, or of those of one service."""
        of = ["--filter", f"label=com.docker.compose.project={self.name}"]
        if service:
            of += ["--filter", f"label=com.docker.compose.service={service}"]
        ids = self.engine.docker("ps", "--all", "--quiet", *of).split()
        found: list[dict[str, Any]] = json.loads(self.engine.docker("inspect", *ids)) if ids else []
        return found

    def running(self, service: str) -> list[dict[str, Any]]:
        """The running containers of a service."""
        return [container for container in self.containers(service) if container["State"]["Running"]]

    def workers(self) -> list[str]:
        """Names of the workers that serve the small model."""
        held: list[str] = self.farm("models").get("tiny", {"workers": []})["workers"]
        return sorted(held)

    def wait(self, what: str, until: Callable[[], Any], seconds: float = 180) -> Any:
        """Call `until` until its result is true; returns the result."""
        deadline = time.monotonic() + seconds
        while not (answer := until()):
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {seconds:.0f} s in vain for {what}\n{self.compose('logs', '--tail=30')}")
            time.sleep(0.5)
        say(what)
        return answer

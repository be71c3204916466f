"""A real Prometheus (Debian's package) with the farm's own configuration."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.servers import missing

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "infra" / "prometheus"


def program(name: str) -> str:
    """Return the path of `prometheus` or `promtool`."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{ROOT / '.cache' / 'debian' / 'usr' / 'bin'}")
    return found or missing(f"no {name}: run infra/ci-packages, or apt-get install prometheus")


def free_port() -> int:
    """Return an unused local port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Prometheus:
    """A client of a running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, promql: str) -> list[dict[str, Any]]:
        """Return the current value of an expression: samples with their labels."""
        result: list[dict[str, Any]] = self._get("query", query=promql)["result"]
        return result

    def value(self, promql: str) -> float | None:
        """Return the single number of an expression, or None if it has no value."""
        found = self.query(promql)
        assert len(found) < 2, found
        return float(found[0]["value"][1]) if found else None

    def targets(self) -> list[dict[str, Any]]:
        """Return the active scrape targets."""
        found: list[dict[str, Any]] = self._get("targets")["activeTargets"]
        return found

    def ready(self) -> bool:
        """Return whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _get(self, what: str, **parameters: str) -> Any:
        address = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error


@contextmanager
def prometheus(folder: Path, dispatcher: str, *, seconds: int = 1) -> Iterator[Prometheus]:
    """Run the shipped configuration against a dispatcher's `host:port`, with intervals of `seconds`."""
    place = folder / "prometheus"
    shutil.copytree(SHIPPED, place)
    config = place / "prometheus.yml"
    text = config.read_text().replace("dispatcher:9400", dispatcher)
    for interval in ("scrape_interval: 15s", "evaluation_interval: 15s", "refresh_interval: 15s"):
        assert interval in text
        text = text.replace(interval, interval.replace("15", str(seconds)))
    config.write_text(text)
    port = free_port()
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={config}",
                f"--storage.tsdb.path={place / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            env={**os.environ, "GOMAXPROCS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        one = Prometheus(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 30
        while not one.ready():
            assert process.poll() is None, (place / "log").read_text()
            assert time.monotonic() < deadline, "Prometheus does not come up"
            time.sleep(0.05)
        yield one
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def promtool(*arguments: str, given: bytes = b"", at: Path = SHIPPED) -> str:
    """Run Prometheus' own checker and return its output; fails with that output if the checker fails."""
    done = subprocess.run([program("promtool"), *arguments], cwd=at, input=given, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said

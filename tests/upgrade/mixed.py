"""A farm of two releases at once: dispatchers, workers, clients and command lines of each, as real processes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farm.settings import Settings
from tests.integration.conftest import Process, environment, wait_until
from tests.releases import Release

_CLIENT = Path(__file__).with_name("client.py")
_WAIT_SECONDS = 120.0


class RemoteError(AssertionError):
    """Raised when a client of either release reports an error."""


class Client:
    """A client process of one release."""

    def __init__(self, side: str, popen: subprocess.Popen[str]) -> None:
        self._side, self._popen = side, popen

    def ask(self, call: str, **arguments: Any) -> Any:
        """Return the result of a request of `tests/upgrade/client.py`; raises `RemoteError` with its error."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(json.dumps({"call": call, "with": arguments}) + "\n")
        self._popen.stdin.flush()
        line = self._popen.stdout.readline()
        if not line:
            raise RemoteError(f"the {self._side} client has ended, asked for {call} {arguments}")
        answer = json.loads(line)
        if "error" in answer:
            raise RemoteError(f"the {self._side} client, asked for {call} {arguments}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """Close the client's input, and wait for its end."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.close()
        self._popen.wait(30)
        self._popen.stdout.close()


@dataclass
class Side:
    """The programs of one release."""

    name: str
    """`old` or `new`."""
    release: Release
    workers: dict[str, Process] = field(default_factory=dict)
    dispatcher: Process | None = None
    client: Client | None = None

    def ask(self, call: str, **arguments: Any) -> Any:
        """Send a request to this release's client; returns the result."""
        assert self.client is not None, f"no {self.name} client is there"
        return self.client.ask(call, **arguments)


class MixedFarm:
    """The services of one farm, and the two sides that use them."""

    def __init__(self, settings: Settings, folder: Path, old: Release, new: Release, undo: ExitStack) -> None:
        self.settings = settings
        self.old, self.new = Side("old", old), Side("new", new)
        self._folder = folder
        self._undo = undo

    @property
    def sides(self) -> tuple[Side, Side]:
        """Both sides, the old one first."""
        return self.old, self.new

    def side(self, name: str) -> Side:
        """Return the side with that name."""
        return self.old if name == "old" else self.new

    def other(self, name: str) -> Side:
        """Return the side with the other name."""
        return self.new if name == "old" else self.old

    # --- starting and stopping ------------------------------------------------------------------------------

    def start_worker(self, side: Side, name: str, models: str, *, slots: int = 2, **env: object) -> Process:
        """Start a worker and wait until a client of its own release lists it as alive."""
        process = self._start(
            side, name, ["-m", "workers", "--name", name], FARM_MODELS=models, FARM_SLOTS=slots, **env
        )
        side.workers[name] = process

        def there() -> bool:
            logged = process.log.read_text()
            assert process.popen.poll() is None, f"the {side.name} worker {name} ended: {logged}"
            return " ready" in logged and any(found.startswith(f"{name}@") for found in side.ask("workers"))

        wait_until(there, f"the {side.name} worker {name} is there", _WAIT_SECONDS)
        return process

    def start_dispatcher(self, side: Side) -> None:
        """Start a dispatcher and wait until it reports that it dispatches or stands by."""
        process = side.dispatcher = self._start(side, f"{side.name}-dispatcher", ["-m", "farm", "dispatcher"])
        wait_until(lambda: "dispatching" in process.log.read_text(), f"the {side.name} dispatcher is up", _WAIT_SECONDS)

    def stop_dispatcher(self, side: Side) -> None:
        """Stop a side's dispatcher; fails unless it exits with 0."""
        if side.dispatcher is not None:
            status, said = side.dispatcher.stop(), side.dispatcher.log.read_text()
            assert status == 0, f"the {side.name} dispatcher ended with {status}: {said}"
            side.dispatcher = None

    def let_lead(self, side: Side) -> None:
        """Leave only this side's dispatcher running."""
        self.stop_dispatcher(self.other(side.name))
        if side.dispatcher is None:
            self.start_dispatcher(side)

    def open_client(self, side: Side) -> None:
        """Start a client process of this side."""
        log = self._undo.enter_context((self._folder / f"{side.name}-client.log").open("w"))
        popen = subprocess.Popen(
            [sys.executable, str(_CLIENT)],
            cwd=side.release.folder,
            env=environment(self.settings, **side.release.env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        side.client = Client(side.name, popen)
        self._undo.callback(side.client.close)

    def run(self, side: Side, *arguments: str) -> str:
        """Return what `farm ARGUMENTS` of a side prints; fails unless it exits with 0."""
        ended = subprocess.run(
            [sys.executable, "-m", "farm", *arguments],
            cwd=side.release.folder,
            env=environment(self.settings, **side.release.env),
            capture_output=True,
            text=True,
            timeout=_WAIT_SECONDS,
            check=False,
        )
        assert ended.returncode == 0, f"{side.name} farm {' '.join(arguments)}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    def _start(self, side: Side, name: str, command: Sequence[str], **env: object) -> Process:
        log = self._folder / f"{name}-{len(list(self._folder.glob(f'{name}-*.log')))}.log"
        with log.open("wb") as stream:
            popen = subprocess.Popen(
                [sys.executable, *command],
                cwd=side.release.folder,
                env=environment(self.settings, **side.release.env, **env),
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process = Process(popen, log, name)
        self._undo.callback(_end, process)
        return process

    # --- waiting --------------------------------------------------------------------------------------------

    def wait_for_job(self, side: Side, job: str, true: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Wait until `true` holds for the job as a client of this side reports it; returns the report."""
        found: dict[str, Any] = {}

        def reported() -> bool:
            found.update(side.ask("job", job=job))
            return true(found)

        try:
            wait_until(reported, what, _WAIT_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}; the {side.name} client reports {found}; {self.logged(job)}") from None
        return found

    def wait_for_batch(self, side: Side, batch: str) -> None:
        """Wait until a client of this side reports that every job of a batch succeeded."""
        wait_until(lambda: side.ask("status", batch=batch)["done"], f"{batch} has ended for {side.name}", _WAIT_SECONDS)
        status = side.ask("status", batch=batch)
        if status["counts"] != {"succeeded": status["total"]}:
            jobs = [job for job in side.ask("batch", batch=batch)["jobs"] if job["state"] != "succeeded"]
            raise AssertionError(f"{status}: {[(job['id'], job['state'], job['error']) for job in jobs]}")

    def rendered_by(self, job: str) -> str:
        """Return the side whose worker rendered a job's picture, as the new client reports it."""
        worker = self.new.ask("attempts", job=job)[-1]["worker"] or ""
        found = [side.name for side in self.sides if worker.partition("@")[0] in side.workers]
        assert found, f"{job} was rendered by {worker!r}, which is of neither side"
        return found[0]

    def ended_by(self, side: Side) -> int:
        """Return the number of jobs whose success a side's workers have logged."""
        return sum(worker.log.read_text().count("now=succeeded") for worker in side.workers.values())

    def logged(self, text: str) -> str:
        """Return the log lines of all programs that contain a text, each after its program's name."""
        lines = [
            f"{path.stem}: {line}"
            for path in sorted(self._folder.glob("*.log"))
            for line in path.read_text(errors="replace").splitlines()
            if text in line
        ]
        return "\n".join(["the logs have:", *lines])

    def errors(self) -> Iterator[str]:
        """Yield the tracebacks that programs of either side have logged, each with its program's name."""
        for path in sorted(self._folder.glob("*.log")):
            said = path.read_text(errors="replace")
            if "Traceback" in said:
                yield f"{path.stem}: {said[said.index('Traceback') :][:3000]}"


def _end(process: Process) -> None:
    if process.popen.poll() is None:
        os.killpg(process.popen.pid, signal.SIGKILL)
        process.popen.wait()
    said = process.log.read_text(errors="replace").splitlines()
    print(f"--- {process.log.name}", *said[-40:], sep="\n")

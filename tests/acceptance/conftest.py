"""A user's farm: `farm up` in a folder of its own, and the command line in the same folder."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.forked import run_forked

ROOT = Path(__file__).parents[2]


class UserFarm:
    """`farm up` as a process, and `farm …` in the same folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("FARM_", "AWS_", "FLOWER_"))}
        self.env = {**mine, "COLUMNS": "200", "FARM_LEASE_SECONDS": "10", "FARM_BEAT_SECONDS": "0.5"}
        self.said = ""
        self._heard = threading.Condition()
        self.popen: subprocess.Popen[str] | None = None

    def up(self) -> None:
        """Start the farm and wait until it reports that it is ready."""
        self.said = ""
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "farm", "up"],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.hear("Ctrl-C stops the farm")

    def _listen(self) -> None:
        assert self.popen is not None
        assert self.popen.stdout is not None
        with self.popen.stdout as stream:
            for line in stream:
                with self._heard:
                    self.said += line
                    self._heard.notify_all()

    def hear(self, words: str, seconds: float = 120) -> None:
        """Wait until the output contains these words."""
        with self._heard:
            assert self._heard.wait_for(lambda: words in self.said, seconds), self.said

    def pid(self, part: str) -> int:
        """Return the process id of a part, from the farm's pid file."""
        record = json.loads((self.folder / ".farm" / "run" / f"{part}.pid").read_text())
        return int(record["pid"])

    def processes(self) -> list[psutil.Process]:
        """Return the farm's process and all its descendants."""
        assert self.popen is not None
        top = psutil.Process(self.popen.pid)
        return [top, *top.children(recursive=True)]

    def down(self) -> int:
        """Stop the farm as Ctrl-C does; returns its exit code."""
        assert self.popen is not None
        self.popen.terminate()
        code = self.popen.wait(60)
        self._listener.join()
        self.popen = None
        return code

    def farm(self, *arguments: object, seconds: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the farm in its folder."""
        return run_forked("farm", *map(str, arguments), cwd=self.folder, env={**self.env, **env}, timeout=seconds)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UserFarm]:
    """A running farm."""
    user = UserFarm(tmp_path_factory.mktemp("user"))
    user.up()
    yield user
    if user.popen is not None:
        user.down()

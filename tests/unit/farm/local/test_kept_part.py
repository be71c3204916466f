"""Restarts of a supervised part."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from farm.local import parts
from farm.local.home import Home
from farm.local.kept_part import KeptPart
from tests.integration.conftest import wait_until


def test_a_part_that_keeps_dying_is_restarted_ever_more_slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.local.kept_part.FIRST_DELAY_SECONDS", 0.01)
    home = Home(tmp_path / "home")
    home.take()
    lines: list[str] = []
    settings = home.settings(home.access())
    part = replace(parts.dispatcher(home, settings), command=(sys.executable, "-c", "raise SystemExit(7)"))
    kept = KeptPart(part, home, lines.append)

    def died(times: int) -> bool:
        kept.tend()
        return len(lines) == times

    wait_until(lambda: died(3), "three deaths", 20)
    kept.end()
    home.release()
    assert [line.split("restarting in ")[1].split(";")[0] for line in lines] == ["0.01 s", "0.02 s", "0.04 s"]

"""The arguments and environment of the embedded farm's parts."""

import os
from pathlib import Path

import pytest

from farm.jobs.database import Database
from farm.jobs.workers import Workers
from farm.local import parts
from farm.local.home import Home


def test_workers_share_the_cores_and_take_turns_on_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("FARM_DATABASE_URL", "sqlite:///elsewhere.db")
    home = Home(tmp_path)
    settings = home.settings(home.access())
    database = Database(settings.database_url)
    made = [parts.worker(home, settings, number, 3, Workers(database, settings)) for number in (1, 2, 3)]
    database.close()
    assert [part.env["FARM_DEVICE"] for part in made] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {part.env["OMP_NUM_THREADS"] for part in made} == {str(max(1, len(os.sched_getaffinity(0)) // 3))}
    assert {part.env["FARM_HOME"] for part in made} == {str(tmp_path)}
    assert not [part for part in made if "FARM_DATABASE_URL" in part.env]

"""Opening a farm."""

from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from farm.cli.main import app
from farm.client.farm import Farm
from farm.errors import SchemaMismatch


@pytest.fixture
def empty_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A SQLite file without a schema, set as the farm's database in the environment."""
    path = tmp_path / "empty.db"
    path.touch()
    monkeypatch.setenv("FARM_DATABASE_URL", f"sqlite:///{path}")
    monkeypatch.setenv("FARM_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("FARM_S3_BUCKET", "pictures")
    return path


def is_open(path: Path) -> bool:
    return str(path) in {file.path for file in psutil.Process().open_files()}


def test_a_farm_that_can_not_be_opened_closes_its_database(empty_database: Path) -> None:
    with pytest.raises(SchemaMismatch):
        Farm()
    assert not is_open(empty_database)


def test_a_dispatcher_that_can_not_start_closes_its_database(empty_database: Path) -> None:
    with pytest.raises(SchemaMismatch):
        CliRunner().invoke(app, ["dispatcher"], catch_exceptions=False)
    assert not is_open(empty_database)

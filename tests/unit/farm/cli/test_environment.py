"""`farm env` writes variables that programs can load, in a file that other users can't read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dotenv import dotenv_values
from typer.testing import CliRunner

from farm.cli.environment import SHARED, as_file, as_shell, reach, variables
from farm.cli.main import app
from farm.errors import NotConfigured, SchemaMismatch, ServiceUnavailable
from farm.settings import EMBEDDED_FILE, Settings

SERVICES = {
    "FARM_DATABASE_URL": "postgresql+psycopg://farm:p%40ss@db.lan:5432/farm?sslmode=require&application_name=farm",
    "FARM_BROKER_URL": "rediss://:pw@[fd00::7]:6379/0",
    "FARM_S3_BUCKET": "pictures",
    "FARM_S3_ENDPOINT_URL": "none",
    "FARM_S3_ACCESS_KEY_ID": "key",
    "FARM_S3_SECRET_ACCESS_KEY": "a/b+c= #d$e&f;(g)*",
    "FARM_LEASE_SECONDS": "30.0",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("FARM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in SERVICES.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def embed(home: Path) -> None:
    home.mkdir()
    services = {
        "database_url": f"sqlite:///{home}/farm.db",
        "broker_url": "redis://:pw@127.0.0.1:1/0",
        "s3_bucket": "farm",
        "s3_endpoint_url": "http://127.0.0.1:2",
        "s3_access_key_id": "key",
        "s3_secret_access_key": "secret",
    }
    (home / EMBEDDED_FILE).write_text(json.dumps(services))


def test_every_shared_setting_is_a_setting() -> None:
    assert set(SHARED) <= Settings.model_fields.keys()


def test_a_file_holds_all_that_is_every_process_s_own_and_nothing_else(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("FARM_MODELS", "sd15=/models/sd15")
    environment.setenv("FARM_DEVICE", "cuda:1")
    assert variables(Settings.load()) == SERVICES


def test_another_machine_reads_the_same_settings(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = Settings.load()
    assert CliRunner().invoke(app, ["env", "--out", "farm.env"], catch_exceptions=False).exit_code == 0
    file = tmp_path / "farm.env"
    assert file.stat().st_mode & 0o777 == 0o600
    assert dotenv_values(file, interpolate=False) == SERVICES
    for name in SERVICES:
        environment.delenv(name)
    environment.setenv("FARM_ENV_FILE", str(file))
    there = Settings.load()
    assert variables(there) == variables(here)
    assert there.s3_endpoint_url is None


@pytest.mark.parametrize("form", [as_file, as_shell])
def test_a_shell_reads_either_form(environment: pytest.MonkeyPatch, form: object) -> None:
    text = form(variables(Settings.load()))  # type: ignore[operator]
    code = "import json, os; print(json.dumps({k: v for k, v in os.environ.items() if k.startswith('FARM_')}))"
    said = subprocess.run(
        ["sh", "-c", f'set -a; eval "$0"; exec "{sys.executable}" -I -S -c "$1"', text, code],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(said.stdout) == SERVICES


@pytest.mark.parametrize("password", ["a'b", "a\\b", "a${HOME}b", "a\nb"])
def test_what_no_two_readers_take_alike_is_refused(environment: pytest.MonkeyPatch, password: str) -> None:
    environment.setenv("FARM_S3_SECRET_ACCESS_KEY", password)
    with pytest.raises(NotConfigured, match="FARM_S3_SECRET_ACCESS_KEY") as caught:
        as_file(variables(Settings.load()))
    assert password not in str(caught.value)


def test_an_embedded_farm_says_that_other_machines_can_not_reach_it(tmp_path: Path) -> None:
    embed(tmp_path / ".farm")
    said = CliRunner().invoke(app, ["env"], catch_exceptions=False)
    assert "FARM_S3_SECRET_ACCESS_KEY=secret\n" in said.stdout
    assert "secret" not in said.stderr
    told = " ".join(said.stderr.split())
    assert "holds the farm's passwords" in told
    assert "SQLite is a file of this machine" in told
    assert "docker-compose.yml" in told
    assert "FARM_BROKER_URL, FARM_S3_ENDPOINT_URL lead to this machine's loopback address" in told


@pytest.fixture(params=[{}, {"FARM_FLOWER_URL": "http://flower:5555"}, {"farm_slots": "3"}], ids=lambda it: str([*it]))
def stopped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stopped embedded farm, with variables that do not name another farm."""
    embed(tmp_path / ".farm")
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)
    return tmp_path / ".farm"


def test_commands_say_that_the_embedded_farm_does_not_run(stopped: Path) -> None:
    with pytest.raises(ServiceUnavailable, match=f"the farm in {stopped} does not run: start it with `farm up`"):
        CliRunner().invoke(app, ["status"], catch_exceptions=False)


def test_the_doctor_says_that_the_embedded_farm_does_not_run(stopped: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    assert done.exit_code == 1
    assert [finding["part"] for finding in json.loads(done.stdout)] == ["settings", "database"]
    assert json.loads(done.stdout)[0]["what"].endswith("but the farm there does not run")


def test_services_in_lower_case_lead_away_from_the_embedded_farm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    embed(tmp_path / ".farm")
    monkeypatch.setenv("farm_database_url", f"sqlite:///{tmp_path}/other.db")
    monkeypatch.setenv("farm_broker_url", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("farm_s3_bucket", "pictures")
    with pytest.raises(SchemaMismatch, match="no farm schema"):
        CliRunner().invoke(app, ["status"], catch_exceptions=False)


def test_a_farm_that_others_reach_has_nothing_to_say(environment: pytest.MonkeyPatch) -> None:
    assert list(reach(Settings.load())) == []
    environment.delenv("FARM_S3_ACCESS_KEY_ID")
    environment.delenv("FARM_S3_SECRET_ACCESS_KEY")
    assert ["credentials" in line for line in reach(Settings.load())] == [True]


def test_a_file_that_everybody_can_read_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "farm.env"
    file.write_text(as_file(SERVICES))
    monkeypatch.setenv("FARM_ENV_FILE", str(file))
    file.chmod(0o644)
    with pytest.raises(NotConfigured, match=f"chmod 600 {file}"):
        Settings.load()
    file.chmod(0o640)  # readable by a service's group
    assert Settings.load().s3_bucket == "pictures"


def test_two_farms_at_once_are_refused(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "farm.env"
    file.write_text(as_file({**SERVICES, "FARM_BROKER_URL": "redis://:other@elsewhere/0"}))
    file.chmod(0o600)
    environment.setenv("FARM_ENV_FILE", str(file))
    with pytest.raises(NotConfigured, match="FARM_BROKER_URL") as caught:
        Settings.load()
    assert "FARM_DATABASE_URL" not in str(caught.value)  # both define the same value
    assert ":other@" not in str(caught.value)
    environment.setenv("FARM_BROKER_URL", "redis://:other@elsewhere/0")
    environment.setenv("FARM_LEASE_SECONDS", "20")  # settings that name no service may differ
    assert Settings.load().lease_seconds == 20


@pytest.mark.parametrize(
    ("content", "why"), [(None, "No such file"), (b"FARM_SLOTS=3\n", "names no farm"), (b"\xff\xfe", "not a file of")]
)
def test_a_file_without_a_farm_is_said_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, why: str
) -> None:
    embed(tmp_path / ".farm")  # it is not used instead
    file = tmp_path / "farm.env"
    if content is not None:
        file.write_bytes(content)
        file.chmod(0o600)
    monkeypatch.setenv("FARM_ENV_FILE", str(file))
    with pytest.raises(NotConfigured, match=why):
        Settings.load()

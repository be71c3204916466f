"""The home of an embedded farm: its lock, its private files, and the state it keeps between runs."""

import json
import os
import socket
import stat
from pathlib import Path

import pytest

from farm.errors import AlreadyRunning, NotConfigured
from farm.local.checks import check_home
from farm.local.home import GRPC, Home, running
from farm.settings import EMBEDDED_FILE, Settings


def saved(path: Path) -> Home:
    home = Home(path)
    home.take()
    home.save(home.access())
    return home


def test_a_home_has_one_owner_at_a_time(tmp_path: Path) -> None:
    home, other = Home(tmp_path / "home"), Home(tmp_path / "home")
    assert running(home.path) is None
    home.take()
    assert running(home.path) == os.getpid()
    with pytest.raises(AlreadyRunning, match=f"process {os.getpid()}"):
        other.take()
    assert running(home.path) == os.getpid()
    home.release()
    assert running(home.path) is None
    other.take()
    other.release()


def test_a_new_home_is_private_and_kept_out_of_repositories(tmp_path: Path) -> None:
    home = saved(tmp_path / "home")
    home.release()
    assert (home.path / ".gitignore").read_text() == "*\n"
    for folder in (home.path, home.logs, home.run, home.data("redis")):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in ("lock", "farm.db", EMBEDDED_FILE):
        assert stat.S_IMODE((home.path / file).stat().st_mode) == 0o600


def test_a_folder_that_was_there_is_not_made_over(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / ".gitignore").write_text("*.pyc\n")
    home = Home(tmp_path)
    home.take()
    home.release()
    assert (tmp_path / ".gitignore").read_text() == "*.pyc\n"
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "farm.db").stat().st_mode) == 0o600


def test_ports_and_passwords_are_kept(tmp_path: Path) -> None:
    home = saved(tmp_path / "home")
    kept = home.access()
    assert kept == home.access() == Home(home.path).access()
    assert Home(tmp_path / "other").access().redis_password != kept.redis_password
    home.release()


@pytest.mark.parametrize("offset", [0, GRPC], ids=["its own", "the one for gRPC"])
def test_ports_that_somebody_else_has_taken_are_replaced_and_passwords_are_not(tmp_path: Path, offset: int) -> None:
    home = saved(tmp_path / "home")
    kept = home.access()
    with socket.create_server(("127.0.0.1", kept.ports["s3"] + offset)):
        access = home.access()
    assert not set(access.ports.values()) & set(kept.ports.values())
    assert access.s3_secret_access_key == kept.s3_secret_access_key
    home.release()


def test_a_file_of_an_older_release_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    home = saved(tmp_path / "home")
    path = home.path / EMBEDDED_FILE
    kept = json.loads(path.read_text())
    del kept["ports"]["admin"], kept["flower_password"]
    path.write_text(json.dumps({**kept, "of_another_release": 1}))
    access = home.access()
    assert access.redis_password == kept["redis_password"]
    assert access.flower_password
    assert set(access.ports) > set(kept["ports"])
    home.release()


def test_a_torn_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    home = saved(tmp_path / "home")
    (home.path / EMBEDDED_FILE).write_text('{"ports": ')
    with pytest.raises(NotConfigured, match=f"{EMBEDDED_FILE} can't be read .* delete it"):
        home.access()
    home.release()


def test_the_settings_are_those_that_other_commands_find_in_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = saved(tmp_path / "home")
    monkeypatch.setenv("FARM_HOME", str(home.path))
    assert Settings.load() == home.settings(home.access())
    monkeypatch.setenv("FARM_DATABASE_URL", "sqlite:///elsewhere.db")
    assert home.settings(home.access()).database_url == f"sqlite:///{home.path / 'farm.db'}"
    home.release()


def test_the_doctor_tells_a_home_that_runs_from_one_that_does_not_or_is_open(tmp_path: Path) -> None:
    home = saved(tmp_path / "home")
    settings = home.settings(home.access())
    found = check_home(settings)
    assert (found.level, f"runs as process {os.getpid()}" in found.what) == ("ok", True)
    (home.path / EMBEDDED_FILE).chmod(0o644)
    found = check_home(settings)
    assert (found.level, found.do) == ("warn", f"chmod 600 {home.path / EMBEDDED_FILE}")
    home.release()
    found = check_home(settings)
    assert (found.level, found.do) == ("bad", "start it: `farm up`")

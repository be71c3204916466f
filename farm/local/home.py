"""What an embedded farm keeps in its home: who runs it, its credentials and ports, and where its files are."""

import fcntl
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from farm.errors import AlreadyRunning, NotConfigured
from farm.runtime.atomic_files import write_atomic
from farm.settings import EMBEDDED_FILE, Settings

LOOPBACK = "127.0.0.1"
BUCKET = "farm"
GRPC = 10_000
"""SeaweedFS's parts talk to each other at their port plus so much, whatever its `.port.grpc` flags say."""
# Both below the range from which Linux and macOS take the ports of outgoing connections: a port that was ours is
# then most likely still free after a restart.
_PORTS = range(12_000, 22_000, 10)
_PORT_NAMES = ("redis", "flower", "s3", "master", "volume", "filer", "admin")


def _secret() -> str:
    return secrets.token_hex(20)


@dataclass(frozen=True)
class Access:
    """The ports and credentials of an embedded farm, made once and kept."""

    ports: Mapping[str, int]
    host: str = LOOPBACK
    """Where Redis and S3 listen."""
    redis_password: str = field(default_factory=_secret, repr=False)
    s3_access_key_id: str = field(default_factory=lambda: f"farm{secrets.token_hex(8)}")
    s3_secret_access_key: str = field(default_factory=_secret, repr=False)
    s3_internal_key: str = field(default_factory=_secret, repr=False)
    """Signs what SeaweedFS's own parts say to each other, so that nobody else can read through their ports."""
    flower_user: str = "farm"
    flower_password: str = field(default_factory=lambda: secrets.token_urlsafe(12), repr=False)
    """Shorter: people type it."""


class Home:
    """The folder of one embedded farm, and the right to run it."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock: IO[str] | None = None

    def take(self) -> None:
        """Make the folder, if need be, and hold it; raises `AlreadyRunning` if another farm does.

        What is in it only its owner can read, even where the folder was there before and is open.
        The kernel lets go of the lock when its holder dies, however it dies.
        """
        if not self.path.exists():
            self.path.mkdir(parents=True, mode=0o700)
            # It holds passwords and pictures, and mostly lies in somebody's repository.
            write_atomic(self.path / ".gitignore", "*\n", private=True)
        opened = os.open(self.path / "lock", os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        lock = os.fdopen(opened, "a+", encoding="utf-8")
        if not _locked(lock):
            lock.seek(0)
            pid = lock.read().strip() or "unknown"
            lock.close()
            raise AlreadyRunning(
                f"a farm already runs in {self.path} (process {pid}): use it as it is, stop it with `kill {pid}`, "
                "or start another one in another FARM_HOME"
            )
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._lock = lock
        for folder in (self.logs, self.run):
            _private(folder)
        # SQLite gives its other files the mode of this one.
        os.close(os.open(self.path / "farm.db", os.O_RDWR | os.O_CREAT, 0o600))
        (self.path / "farm.db").chmod(0o600)

    def release(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.truncate(0)
            self._lock.close()
            self._lock = None

    @property
    def logs(self) -> Path:
        """Where each part writes `<part>.log`."""
        return self.path / "logs"

    @property
    def run(self) -> Path:
        """Where each running part has its `<part>.pid`."""
        return self.path / "run"

    def data(self, part: str) -> Path:
        """The folder of a part's own data."""
        return _private(self.path / part)

    def access(self) -> Access:
        """The credentials and ports from last time; what is missing, and ports that others took, are made anew."""
        kept = self._kept()
        ports = kept.pop("ports", None)
        if not isinstance(ports, dict) or set(ports) != set(_PORT_NAMES) or not _free(list(ports.values())):
            ports = _free_ports()
        names = set(Access.__dataclass_fields__) - {"ports", "host"}
        return Access(ports=ports, **{name: value for name, value in kept.items() if name in names})

    def settings(self, access: Access) -> Settings:
        """The settings with which everything finds this farm, whatever services the environment names."""
        return Settings.load(home=self.path, **self.services(access))

    def save(self, access: Access) -> None:
        """Write down how to reach this farm, for every command that runs in the same home."""
        values = {**self.services(access), **asdict(access)}
        write_atomic(self.path / EMBEDDED_FILE, json.dumps(values, indent=2) + "\n", private=True, durable=True)

    def services(self, access: Access) -> dict[str, str]:
        """Where the services are, under the names of `Settings`' fields."""
        ports = access.ports
        return {
            "database_url": f"sqlite:///{self.path / 'farm.db'}",
            "broker_url": f"redis://:{access.redis_password}@{access.host}:{ports['redis']}/0",
            "s3_bucket": BUCKET,
            "s3_endpoint_url": f"http://{access.host}:{ports['s3']}",
            "s3_access_key_id": access.s3_access_key_id,
            "s3_secret_access_key": access.s3_secret_access_key,
            "flower_url": f"http://{LOOPBACK}:{ports['flower']}",
        }

    def _kept(self) -> dict[str, Any]:
        path = self.path / EMBEDDED_FILE
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise NotConfigured(f"{path} can't be read ({error}): delete it, and `farm up` makes a new one") from None
        return kept if isinstance(kept, dict) else {}


def _private(folder: Path) -> Path:
    """A folder for its owner only, also where it was there before and open."""
    folder.mkdir(exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    return folder


def _locked(lock: IO[str]) -> bool:
    for attempt in range(5):
        if attempt:  # it may have been `running`, which holds it for a moment
            time.sleep(0.05)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        return True
    return False


def running(home: Path) -> int | None:
    """The process id of the embedded farm that runs in this home, or None."""
    try:
        with (home / "lock").open(encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(lock.read().strip() or 0)
    except OSError:
        pass
    return None


def _free(ports: Sequence[int]) -> bool:
    for port in [*ports, *(port + GRPC for port in ports)]:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                return False
    return True


def _free_ports() -> dict[str, int]:
    while True:
        first = secrets.choice(_PORTS)
        ports = {name: first + place for place, name in enumerate(_PORT_NAMES)}
        if _claim(first) and _free(list(ports.values())):
            return ports


_claims: list[int] = []


def _claim(first: int) -> bool:
    """Whether no other farm that starts on this machine takes these ten ports; until this process ends.

    Its parts bind them one after the other, some of them seconds later. Only on Linux: such a name needs no file.
    """
    if sys.platform != "linux":
        return True
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0diffusion-farm/ports/{first}")
    except OSError:
        claim.close()
        return False
    _claims.append(claim.detach())
    return True

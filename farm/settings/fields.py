"""`Settings`: every `FARM_*` variable, its default and its meaning."""

import getpass
from pathlib import Path
from typing import Any, Self

from pydantic import ByteSize, Field, SecretStr, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from farm.errors import NotConfigured
from farm.settings.sources import PREFIX, SERVICES, embedded_home, sources, variable, variables_naming_a_farm

_CACHE = Path(".cache") / "diffusion-farm"
_RENEWAL_SECONDS = 0.5
"""How long the renewal of a lease may take where the lease is the shortest that is accepted."""


class Settings(BaseSettings):
    """All settings: from `FARM_*` variables, the file that `FARM_ENV_FILE` names, or the embedded farm.

    Without `FARM_DATABASE_URL`, `FARM_BROKER_URL` and `FARM_S3_BUCKET`, the services are those of the embedded farm in
    `FARM_HOME`. The value `none` stands for None. `Settings.load()` makes one, and says what is missing. The fields'
    docstrings are the page docs/settings.md.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="ignore",
        env_parse_none_str="none",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    home: Path = Path(".farm")
    """The folder of the embedded farm."""
    database_url: str = Field(repr=False)
    """The database: `sqlite:///path` or `postgresql://user:password@host/name`."""
    broker_url: str = Field(repr=False)
    """Redis: `redis://:password@host:port/0`, or `rediss://` for TLS."""
    s3_bucket: str
    """The bucket for pictures and all other objects."""
    s3_endpoint_url: str | None = None
    """The address of the S3 service; `none` is AWS."""
    s3_public_endpoint_url: str | None = None
    """The address of the S3 service in presigned URLs, if it differs from `FARM_S3_ENDPOINT_URL`."""
    s3_access_key_id: str | None = None
    """The access key for S3; `none` leaves the choice to boto3: `AWS_*`, `~/.aws`, the role of the instance."""
    s3_secret_access_key: SecretStr | None = None
    """The secret key that belongs to `FARM_S3_ACCESS_KEY_ID`."""
    s3_region: str = "us-east-1"
    """The region of the bucket."""
    flower_url: str | None = None
    """The address of Flower, for `farm doctor` and for people."""

    owner: str = Field(default_factory=getpass.getuser)
    """The owner of new batches; your user name by default."""
    window: int = Field(default=128, ge=1)
    """The most jobs of one model that are in Redis at once, for urgent and other jobs each; the rest waits in SQL."""
    most_queued: int | None = Field(default=None, ge=1)
    """The most jobs of one owner that are in Redis at once, for owners without a limit of their own."""
    starvation_seconds: float = Field(default=300.0, gt=0)
    """A batch that was not served for this time is served next, whatever its priority."""
    lease_seconds: float = Field(default=10.0, gt=0)
    """A worker loses its jobs when it has not renewed its leases for this time."""
    beat_seconds: float = Field(default=2.0, gt=0)
    """The interval at which a worker renews its leases; less than half of `FARM_LEASE_SECONDS`."""
    max_tries: int = Field(default=5, ge=1)
    """A job fails after this many errors."""
    retry_seconds: float = Field(default=2.0, ge=0)
    """The longest wait of a job after its first error; each further error makes it four times as long."""
    retry_max_seconds: float = Field(default=300.0, ge=0)
    """The longest wait of a job after any error."""
    max_lost_leases: int = Field(default=5, ge=1)
    """A job fails after this many lost leases, since it may be what kills the workers."""
    retention_days: float | None = Field(default=None, ge=0)
    """A batch is deleted, with its pictures, this many days after its end; `none` or 0 keeps it."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """The port on which a dispatcher or worker serves Prometheus metrics; 0 is any free port, `none` serves nothing."""
    metrics_host: str = "127.0.0.1"
    """The address for the metrics; `0.0.0.0` lets other machines read them, without a password."""
    progress_seconds: float | None = Field(default=1.0, ge=1)
    """The interval at which Flower gets the progress of renders and batches; `none` sends it nothing."""

    models: str = "tiny"
    """The models that a worker pins: `name=source` or a source, separated by commas; `tiny` ships with the farm."""
    device: str | None = None
    """The device of a worker: `cuda`, `cuda:1` or `cpu`; `none` takes a GPU if there is one."""
    dtype: str | None = None
    """The type of the weights: `float32`, `bfloat16` or `float16`; `none` takes the best one for the device."""
    slots: int = Field(default=16, ge=1, le=256)
    """The most jobs that a worker renders at once; how many of them share a forward is measured."""
    memory_budget: ByteSize | None = Field(default=None, gt=0)
    """The device memory for the pinned models together, such as `20GiB`; `none` is the memory of the device."""
    model_cache: Path = Field(default_factory=lambda: Path.home() / _CACHE / "models")
    """The folder for models from the object store, shared by all workers of a machine."""
    model_cache_size: ByteSize | None = Field(default=None, gt=0)
    """The most disk space for that folder, such as `200GB`; `none` is the size of the disk."""
    forward_sizes: Path = Field(default_factory=lambda: Path.home() / _CACHE / "forwards.json")
    """The JSON file for the best sizes of forwards, as measured on this machine."""
    compile: bool = True
    """Whether the denoisers are compiled by `torch.compile` on CUDA."""
    deterministic: bool = False
    """Whether all forwards have one fixed shape, so that the bytes of a picture do not depend on other jobs; slower."""
    embeddings: int = Field(default=1024, ge=0)
    """The number of prompts whose text embeddings a worker keeps."""
    checkpoint_seconds: float | None = Field(default=30.0, gt=0)
    """The interval at which running renders are checkpointed to the object store; `none` is never by time."""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """The number of steps after which a running render is checkpointed; `none` leaves it to the interval alone."""
    preview_steps: int = Field(default=5, ge=1)
    """The number of steps between two previews of a render that is watched."""
    stuck_seconds: float = Field(default=300.0, gt=0)
    """A worker ends itself when a forward takes longer; on a GPU, also when a text or a picture does."""
    drain_seconds: float = Field(default=20.0, ge=0)
    """The time that a stopping worker has to finish its renders; it hands the others back with a checkpoint."""

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
                f"{variable(str(e['loc'][0]))}: {e['msg']}, not {e['input']!r}" if e["loc"] else e["msg"]
                for e in error.errors()
                if e["type"] != "missing"
            ]
            if wrong:
                raise NotConfigured("; ".join(wrong)) from None
            naming = variables_naming_a_farm()
            if not naming and len(missing) == len(SERVICES):
                raise NotConfigured(
                    f"no farm found: start one with `farm up` (its home would be {embedded_home().absolute()}), or set "
                    "FARM_DATABASE_URL, FARM_BROKER_URL and FARM_S3_BUCKET"
                ) from None
            raise NotConfigured(
                f"{', '.join(map(variable, missing))} not set, while {', '.join(naming) or 'others'} "
                f"{'is' if len(naming) == 1 else 'are'}: set all of them or none"
            ) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Called by pydantic-settings; `sources` decides."""
        return sources(settings_cls, init_settings, env_settings)


def _impossible(why: str) -> PydanticCustomError:
    return PydanticCustomError("impossible", "{why}", {"why": why})

"""Batches, jobs and workers as plain data, independent of a database session."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from farm.errors import ErrorClass
from farm.jobs.schema import WorkerRow
from farm.jobs.served_models import DeviceMemory, ServedModel, device_memory, served_models
from farm.jobs.states import JobState, Outcome
from farm.specs.spec import RenderSpec


@dataclass(frozen=True)
class Claim:
    """A worker's right to render one attempt of a job, until its lease runs out."""

    job_id: str
    attempt: int
    spec: RenderSpec
    batch_id: str
    batch_name: str
    index: int
    total: int
    priority: int
    checkpoint_key: str | None
    """The checkpoint from which it resumes; None: it starts at the first step."""
    tries: int = 0
    """Errors before this attempt."""
    waited_seconds: float = 0.0
    """Since its batch was accepted."""


@dataclass(frozen=True)
class Doorbell:
    """The message to a worker: a job is queued. Its spec is in SQL."""

    job_id: str
    model: str
    priority: int
    """0 to 100, higher first."""
    shown: str
    """Its description in Flower: batch, index, prompt."""


@dataclass(frozen=True)
class Pace:
    """The progress and speed of a render."""

    steps_done: int
    seconds_per_step: float | None


class Role(StrEnum):
    """The kind of an artifact."""

    IMAGE = "image"
    """The picture."""
    FILM_STRIP = "film-strip"
    """The pictures after every step, on one page."""
    ANIMATION = "animation"
    """The pictures after every step, one after the other."""


@dataclass(frozen=True)
class Artifact:
    """An object stored by a finished job."""

    role: Role
    key: str
    media_type: str
    """An IANA media type, such as `image/png`."""
    n: int = 0
    """Its index among the job's artifacts of this role, from 0."""
    sha256: str | None = None
    """Hexadecimal. The hash and the sizes are None for objects of workers before release 0.2."""
    bytes: int | None = None
    width: int | None = None
    """In pixels, like the height."""
    height: int | None = None


@dataclass(frozen=True)
class Picture:
    """The picture of a finished job, in the object store.

    To record another fact about pictures, add a field with a default: it is stored, and printed by `--json` and the
    manifest, unchanged. Its value must be JSON.
    """

    key: str
    sha256: str
    bytes: int
    width: int
    height: int
    model_sha256: str
    render_seconds: float
    """From its start in a slot of the engine to its last pixel."""
    warnings: Sequence[str] = ()
    device_seconds: float | None = None
    """Its share of the device's time."""
    dtype: str | None = None
    """The precision in which the denoiser computed, such as `bfloat16`; None if it is unknown."""


@dataclass(frozen=True)
class Success:
    """The objects that an attempt has stored."""

    claim: Claim
    picture: Picture
    artifacts: Sequence[Artifact] = ()
    """The artifacts beside the picture."""


@dataclass(frozen=True)
class Beat:
    """The answer to a worker's heartbeat."""

    cancelled: frozenset[str]
    """Jobs whose cancellation is requested."""
    paused: frozenset[str]
    """Paused jobs, which the worker hands back with a checkpoint."""
    lost: frozenset[str]
    """Jobs whose lease this worker no longer holds."""
    previews: Mapping[str, bool]
    """Jobs whose previews are requested, and whether the VAE decodes them."""


@dataclass(frozen=True)
class BatchStatus:
    """The progress of a batch."""

    id: str
    name: str
    owner: str
    priority: int
    total: int
    created_at: datetime
    counts: Mapping[JobState, int]
    """The number of jobs in each state."""
    finished_at: datetime | None = None
    """When its last job ended; None while a job is active."""
    paused: bool = False
    """Whether it or its owner is paused: none of its jobs is rendered until it is resumed."""

    @property
    def ended(self) -> int:
        """The number of jobs in a terminal state."""
        return sum(n for state, n in self.counts.items() if state.terminal)

    @property
    def done(self) -> bool:
        """Whether every job has ended."""
        return self.ended == self.total


@dataclass(frozen=True)
class JobInfo:
    """A job, as recorded in SQL."""

    id: str
    batch_id: str
    index: int
    spec: RenderSpec
    state: JobState
    attempt: int
    tries: int
    worker: str | None
    steps_done: int
    seconds_per_step: float | None
    error: str | None
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    picture: Picture | None
    """Set if it succeeded."""
    lost_leases: int = 0
    not_before: datetime | None = None
    """It stays in the backlog until then."""
    avoid_worker: str | None = None
    """The worker without enough memory for it."""
    paused: bool = False
    """Whether the job itself is paused; its batch or owner may be paused too."""
    reused_from: str | None = None
    """The job whose picture was copied."""
    artifacts: tuple[Artifact, ...] = ()
    """All objects that it has stored, its picture first; empty unless it succeeded."""

    @property
    def eta_seconds(self) -> float | None:
        """The time for its remaining steps at its latest speed; None if that is unknown or it is not running."""
        if self.state is not JobState.RUNNING or self.seconds_per_step is None:
            return None
        return max(0, self.spec.num_inference_steps - self.steps_done) * self.seconds_per_step


@dataclass(frozen=True)
class AttemptInfo:
    """An ended attempt of a job, and its outcome."""

    attempt: int
    worker: str | None
    started_at: datetime | None
    ended_at: datetime
    outcome: Outcome
    error_class: ErrorClass | None
    reason: str | None
    steps_done: int
    device_seconds: float | None

    @property
    def seconds(self) -> float | None:
        """Its duration; None if its start is unknown."""
        return None if self.started_at is None else (self.ended_at - self.started_at).total_seconds()


@dataclass(frozen=True)
class WorkerInfo:
    """A worker, as registered."""

    name: str
    device: str
    dtype: str
    slots: int
    version: str
    models: Sequence[ServedModel] = ()
    started_at: datetime | None = None
    alive: bool = True
    """Whether its last heartbeat is less than one lease time old."""
    metrics_url: str | None = None
    """The URL of its metrics for Prometheus, if it serves any."""
    memory: DeviceMemory | None = None
    """None if it is unknown."""

    @property
    def held(self) -> tuple[str, ...]:
        """The names of the models that it has loaded now."""
        return tuple(model.name for model in self.models if model.loaded)


def worker_info(row: WorkerRow, *, alive: bool) -> WorkerInfo:
    """Return a worker's row as plain data."""
    return WorkerInfo(
        name=row.name,
        device=row.device,
        dtype=row.dtype,
        slots=row.slots,
        version=row.version,
        models=served_models(row.models),
        started_at=row.started_at,
        alive=alive,
        metrics_url=row.metrics_url,
        memory=device_memory(row.memory_used, row.memory_total, row.models),
    )

"""What SQL says about batches, jobs and workers, as plain data that outlives its session."""

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
    """What an earlier attempt left to go on from; None means from the first step."""
    tries: int = 0
    """Errors before this attempt."""
    waited_seconds: float = 0.0
    """Since its batch was handed in."""


@dataclass(frozen=True)
class Doorbell:
    """What a worker is told of a job: that it is there. What it is, SQL says."""

    job_id: str
    model: str
    priority: int
    """0 to 100, the higher the sooner."""
    shown: str
    """How Flower names it: batch, place, prompt."""


@dataclass(frozen=True)
class Pace:
    """How far one render is, and how fast it goes."""

    steps_done: int
    seconds_per_step: float | None


class Role(StrEnum):
    """What an artifact of a job is."""

    IMAGE = "image"
    """The picture."""
    FILM_STRIP = "film-strip"
    """The picture after every step, on one page."""
    ANIMATION = "animation"
    """The picture after every step, one after the other."""


@dataclass(frozen=True)
class Artifact:
    """One object that a finished job has stored."""

    role: Role
    key: str
    media_type: str
    """An IANA media type, such as `image/png`."""
    n: int = 0
    """Which of the job's artifacts of this role, from 0."""
    sha256: str | None = None
    """Hexadecimal. This and the sizes are None for what a worker before release 0.2 stored."""
    bytes: int | None = None
    width: int | None = None
    """In pixels, like the height."""
    height: int | None = None


@dataclass(frozen=True)
class Picture:
    """The picture of a finished job, in the object store.

    To record another fact about pictures, add a field with a default: it is stored, and printed by `--json` and the
    manifest, as it is. It must be JSON.
    """

    key: str
    sha256: str
    bytes: int
    width: int
    height: int
    model_sha256: str
    render_seconds: float
    """From its slot in the engine to its last pixel."""
    warnings: Sequence[str] = ()
    device_seconds: float | None = None
    """Its own share of the device's time."""
    dtype: str | None = None
    """The precision in which the denoiser computed, such as `bfloat16`; None if it is unknown."""


@dataclass(frozen=True)
class Success:
    """What an attempt has stored."""

    claim: Claim
    picture: Picture
    artifacts: Sequence[Artifact] = ()
    """The artifacts beside the picture."""


@dataclass(frozen=True)
class Beat:
    """What a worker learns when it renews its leases."""

    cancelled: frozenset[str]
    """Jobs somebody wants stopped."""
    paused: frozenset[str]
    """Jobs to be handed back with their state, until somebody lets them go on."""
    lost: frozenset[str]
    """Jobs whose lease was no longer this worker's."""
    previews: Mapping[str, bool]
    """Jobs somebody watches now, and whether their previews are to be decoded by the VAE."""


@dataclass(frozen=True)
class BatchStatus:
    """How far a batch is."""

    id: str
    name: str
    owner: str
    priority: int
    total: int
    created_at: datetime
    counts: Mapping[JobState, int]
    """Every state's number of jobs."""
    finished_at: datetime | None = None
    """When its last job ended; None while one is active."""
    paused: bool = False
    """Whether nothing of it is rendered until somebody lets it go on: it is paused, or its owner is."""

    @property
    def ended(self) -> int:
        """How many jobs are in a terminal state."""
        return sum(n for state, n in self.counts.items() if state.terminal)

    @property
    def done(self) -> bool:
        """Whether every job has ended."""
        return self.ended == self.total


@dataclass(frozen=True)
class JobInfo:
    """One job as SQL has it."""

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
    """Set when it succeeded."""
    lost_leases: int = 0
    not_before: datetime | None = None
    """Until then it stays in the backlog."""
    avoid_worker: str | None = None
    """Where there was no memory for it."""
    paused: bool = False
    """Whether it is paused by itself; its batch or its owner may be as well."""
    reused_from: str | None = None
    """The job whose picture its own is a copy of."""
    artifacts: tuple[Artifact, ...] = ()
    """Everything that it has stored, its picture first; empty unless it succeeded."""

    @property
    def eta_seconds(self) -> float | None:
        """How long its remaining steps will take at its latest pace; None while that is unknown or it does not run."""
        if self.state is not JobState.RUNNING or self.seconds_per_step is None:
            return None
        return max(0, self.spec.num_inference_steps - self.steps_done) * self.seconds_per_step


@dataclass(frozen=True)
class AttemptInfo:
    """What became of one attempt of a job."""

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
        """How long it took."""
        return None if self.started_at is None else (self.ended_at - self.started_at).total_seconds()


@dataclass(frozen=True)
class WorkerInfo:
    """One worker, as it has registered."""

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
        """The names of the models that are loaded there now."""
        return tuple(model.name for model in self.models if model.loaded)


def worker_info(row: WorkerRow, *, alive: bool) -> WorkerInfo:
    """A worker's row as plain data."""
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

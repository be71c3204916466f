"""A render request in the engine: its state, its progress, its snapshots and its result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from farm.errors import RenderHandedBack
from farm.specs.spec import URGENT as URGENT
from farm.specs.spec import RenderSpec


@dataclass(frozen=True, eq=False)
class Sampling:
    """A sampler at a number of steps: its timesteps, and its table if it is linear."""

    name: str
    """The noise scheduler's class name."""
    timesteps: tuple[float, ...]
    """The timestep of each forward. Second-order samplers have more forwards than the spec has steps."""
    init_noise_sigma: float
    make: Callable[[], Any] = field(repr=False)
    """Makes a noise scheduler for one request, with its timesteps set."""
    step_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """The arguments of each `step` in diffusers' pipeline beside the generator, such as eta."""
    scales: tuple[float, ...] = ()
    """The factors of the latents as the denoiser's input, by forward; 1 at the end."""
    lags: int = 0
    """The number of (latents, output) pairs that a step uses; 0 without a table."""
    weights: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    """The weights by forward: of latents, output, earlier latents, earlier output, …; then of each noise."""
    draws: tuple[int, ...] = ()
    """The number of noises that each step draws."""


@dataclass(frozen=True)
class Progress:
    """The progress of a request."""

    steps_done: int
    steps_total: int
    """The `num_inference_steps` of its spec."""
    seconds: float | None
    """The time since it got its slot; None while it waits."""
    seconds_per_step: float | None = None
    """The measured pace of its last steps; None before the first."""


@dataclass(frozen=True)
class Snapshot:
    """The state between two steps from which a render can be resumed."""

    spec: RenderSpec
    model_sha256: str
    step_index: int
    """The number of forwards done."""
    steps_done: int
    latents: torch.Tensor
    history: tuple[torch.Tensor, ...]
    generator: torch.Tensor
    """uint8: `torch.Generator.get_state`."""
    scheduler: dict[str, Any]
    """The attributes of a noise scheduler that is stepped as an object; empty for a table."""


class RequestHandedBack(RenderHandedBack):
    """Raised for a request that its worker hands back; carries its state if it has started."""

    def __init__(self, message: str, snapshot: Snapshot | None) -> None:
        super().__init__(message)
        self.snapshot = snapshot


@dataclass(eq=False)
class RenderRequest:
    """A job in the engine, created from its id and its spec.

    `Pipeline.plan` and `Pipeline.encode` set the other attributes. It contains everything that the picture
    depends on, so a request can be preempted, moved or stored between any two steps.
    """

    id: str
    spec: RenderSpec
    priority: int = 50
    """0 to 100; `URGENT` and above preempts requests below that."""
    deterministic: bool = False
    """Whether its bytes are independent of the other requests of its forwards: those have a fixed number of rows."""
    attempt: int = 1
    """Of two requests with the same id, the later attempt replaces the earlier."""
    resume: Snapshot | None = field(default=None, repr=False)
    """The state of an earlier attempt, from which `Pipeline.encode` resumes."""

    rows: int = field(init=False, default=1)
    """Its rows in a forward, as its family declares: 2 (negative, positive) with classifier-free guidance."""
    text_tokens: int = field(init=False, default=0)
    """The length of its texts' embeddings, where a spec can change it: only equal ones fit into one forward."""
    sampling: Sampling = field(init=False, repr=False)
    """Its sampler at its number of steps, shared by requests with the same ones."""
    latents: torch.Tensor = field(init=False, repr=False)
    """float32, (1, *shape), on the pipeline's device. Replaced and never written in place: references stay valid."""
    history: tuple[torch.Tensor, ...] = field(init=False, repr=False, default=())
    """Earlier (latents, output, latents, output, …), newest first, as many as its sampler uses."""
    scheduler: Any = field(init=False, repr=False, default=None)
    """Its own diffusers noise scheduler, which keeps the history, if its sampler has no table."""
    generator: torch.Generator = field(init=False, repr=False)
    """A generator on the CPU, so that every device starts from the same noise."""
    drawn: tuple[int, tuple[torch.Tensor, ...]] = field(init=False, repr=False, default=(-1, ()))
    """The current step and its noise: a repeated step uses the same."""
    conditioning: dict[str, torch.Tensor] = field(init=False, repr=False, default_factory=dict)
    """The denoiser's inputs beside latents and timesteps, each (rows, …)."""
    step_index: int = field(init=False, default=0)
    """The number of forwards done; the next one is at `sampling.timesteps[step_index]`."""
    first_bad: torch.Tensor | None = field(init=False, repr=False, default=None)
    """On a GPU: the first step after which its latents were not finite, or 0; read only at its end."""
    started: float | None = field(init=False, default=None)
    """When it got its slot, by `time.monotonic`."""
    stepped: float | None = field(init=False, default=None)
    """When its last step ended, or when it got its slot."""
    seconds_per_forward: float | None = field(init=False, default=None)
    """The measured time of a forward, smoothed over the last ones."""
    device_seconds: float = field(init=False, default=0.0)
    """Its share, by rows, of the time of its forwards, without those before a resume."""
    frames: list[torch.Tensor] = field(init=False, repr=False, default_factory=list)
    """For `spec.trajectory`: the latents after each step, (1, *shape), scaled as the decoder expects."""
    warnings: list[str] = field(init=False, default_factory=list)

    @property
    def denoised(self) -> bool:
        """Whether all its forwards are done."""
        return self.step_index >= len(self.sampling.timesteps)

    @property
    def steps_done(self) -> int:
        """The steps done, out of the spec's `num_inference_steps`, whatever the sampler's number of forwards."""
        if not self.step_index:
            return 0
        return self.spec.num_inference_steps * self.step_index // len(self.sampling.timesteps)

    @property
    def seconds_per_step(self) -> float | None:
        """The measured pace; None before its first step."""
        if self.seconds_per_forward is None:
            return None
        return self.seconds_per_forward * len(self.sampling.timesteps) / self.spec.num_inference_steps

    @property
    def seconds_left(self) -> float | None:
        """The time of its remaining steps at the measured pace; None before its first step."""
        if self.seconds_per_forward is None:
            return None
        return self.seconds_per_forward * (len(self.sampling.timesteps) - self.step_index)

    def progress(self, now: float) -> Progress:
        """Its progress at a time of `time.monotonic`."""
        seconds = None if self.started is None else now - self.started
        return Progress(self.steps_done, self.spec.num_inference_steps, seconds, self.seconds_per_step)

    def note_finite(self, finite: torch.Tensor) -> None:
        """Record in `first_bad` whether its latents are finite after this step: a bool on its device, not read here."""
        before = torch.zeros_like(finite, dtype=torch.int64) if self.first_bad is None else self.first_bad
        self.first_bad = torch.where((before == 0) & ~finite, self.steps_done, before)

    def stepped_at(self, now: float) -> None:
        """Count a forward that ended at `now`."""
        self.step_index += 1
        if self.stepped is not None:
            took, before = now - self.stepped, self.seconds_per_forward
            self.seconds_per_forward = took if before is None else 0.7 * before + 0.3 * took
        self.stepped = now

    def snapshot(self, model_sha256: str) -> Snapshot:
        """Its state between two steps; called by the thread that steps it."""
        attributes = vars(self.scheduler) if self.scheduler is not None else {}
        # Schedulers change their lists in place, and replace their tensors.
        copied = {key: list(value) if isinstance(value, list) else value for key, value in attributes.items()}
        return Snapshot(
            spec=self.spec,
            model_sha256=model_sha256,
            step_index=self.step_index,
            steps_done=self.steps_done,
            latents=self.latents,
            history=self.history,
            generator=self.generator.get_state(),
            scheduler=copied,
        )


@dataclass(frozen=True)
class Rendered:
    """A finished picture with the facts of its render."""

    image: Image.Image
    """8-bit RGB."""
    model: str
    model_sha256: str
    width: int
    height: int
    steps: int
    scheduler: str
    """The noise scheduler's class name."""
    device: str
    dtype: str
    render_seconds: float
    """From getting its slot to the last pixel; other requests rendered in the same time."""
    device_seconds: float = 0.0
    """Its own share of that on the device."""
    warnings: tuple[str, ...] = ()
    """Warnings about the picture, such as a prompt cut at 77 tokens."""
    frames: tuple[Image.Image, ...] = ()
    """For `spec.trajectory`: the picture after each step; the last one is `image`."""

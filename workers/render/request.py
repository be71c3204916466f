"""A render inside the engine: its state while it runs, what can be taken from it meanwhile, and what comes out."""

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
    """One sampler at one number of steps: its timesteps, and its table if it has one."""

    name: str
    """The noise scheduler's class name."""
    timesteps: tuple[float, ...]
    """One a forward. Second-order samplers have more than the spec has steps."""
    init_noise_sigma: float
    make: Callable[[], Any] = field(repr=False)
    """A new noise scheduler, its timesteps set, for a request of its own."""
    step_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What diffusers' pipeline hands to each `step` beside the generator, such as eta."""
    scales: tuple[float, ...] = ()
    """What the latents are multiplied with for the denoiser, by forward; 1 at the end."""
    lags: int = 0
    """How many (latents, output) pairs a step looks at; 0 means that there is no table."""
    weights: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    """By forward: of latents, output, earlier latents, earlier output, …; then of each noise."""
    draws: tuple[int, ...] = ()
    """How many noises each step draws."""


@dataclass(frozen=True)
class Progress:
    """How far one request is."""

    steps_done: int
    steps_total: int
    """In the steps its spec asked for."""
    seconds: float | None
    """Since it took its slot; None while it waits for one."""
    seconds_per_step: float | None = None
    """Measured over its last steps; None before the first."""


@dataclass(frozen=True)
class Snapshot:
    """Everything a render's next steps depend on besides its spec, between two steps."""

    spec: RenderSpec
    model_sha256: str
    step_index: int
    """Forwards already done."""
    steps_done: int
    latents: torch.Tensor
    history: tuple[torch.Tensor, ...]
    generator: torch.Tensor
    """uint8: `torch.Generator.get_state`."""
    scheduler: dict[str, Any]
    """What a noise scheduler that is stepped as an object remembers; empty for one that is a table."""


class HandedBack(RenderHandedBack):
    """Raised for a request whose worker drains, with its state if it had begun."""

    def __init__(self, message: str, snapshot: Snapshot | None) -> None:
        super().__init__(message)
        self.snapshot = snapshot


@dataclass(eq=False)
class RenderRequest:
    """One job inside the engine, made from its id and its spec.

    `Pipeline.plan` and `Pipeline.encode` set the rest. Everything the picture depends on is in here, so a request can
    be put aside, moved or written down between any two steps.
    """

    id: str
    spec: RenderSpec
    priority: int = 50
    """0 to 100; from `URGENT` on it takes the slot of one below that."""
    deterministic: bool = False
    """Whether its bytes may not depend on its neighbours: its forwards have one fixed shape."""
    attempt: int = 1
    """Of two requests with one id the later attempt stays."""
    resume: Snapshot | None = field(default=None, repr=False)
    """Where an earlier attempt stopped; `Pipeline.encode` goes on from there."""

    rows: int = field(init=False, default=1)
    """Rows that it takes in a forward, as its family says: 2 (negative, positive) with classifier-free guidance."""
    sampling: Sampling = field(init=False, repr=False)
    """Its sampler at its number of steps, shared with others of the same."""
    latents: torch.Tensor = field(init=False, repr=False)
    """float32, (1, *shape), on the pipeline's device. Never written in place: whoever holds one may keep it."""
    history: tuple[torch.Tensor, ...] = field(init=False, repr=False, default=())
    """Earlier (latents, output, latents, output, …), newest first: as many as its sampler looks back."""
    scheduler: Any = field(init=False, repr=False, default=None)
    """Its own diffusers noise scheduler, if its sampler is no table: its `step` keeps history."""
    generator: torch.Generator = field(init=False, repr=False)
    """On the CPU, so that every device starts from the same noise."""
    drawn: tuple[int, tuple[torch.Tensor, ...]] = field(init=False, repr=False, default=(-1, ()))
    """The noise of the step it is at: a step that is tried again draws the same."""
    conditioning: dict[str, torch.Tensor] = field(init=False, repr=False, default_factory=dict)
    """The denoiser's inputs beside latents and timesteps, each (rows, …)."""
    step_index: int = field(init=False, default=0)
    """Forwards already done; the next one is at `sampling.timesteps[step_index]`."""
    first_bad: torch.Tensor | None = field(init=False, repr=False, default=None)
    """On a GPU: the first step after which its latents were not finite, 0 if none was; read at its end."""
    started: float | None = field(init=False, default=None)
    """When it took its slot, by `time.monotonic`."""
    stepped: float | None = field(init=False, default=None)
    """When its last step ended, or it took its slot."""
    seconds_per_forward: float | None = field(init=False, default=None)
    """Measured, smoothed over its last few."""
    device_seconds: float = field(init=False, default=0.0)
    """Its part, by rows, of the time its forwards took; not those before a resume."""
    frames: list[torch.Tensor] = field(init=False, repr=False, default_factory=list)
    """For `spec.trajectory`: the latents after each step, (1, *shape), at the size the decoder expects."""
    warnings: list[str] = field(init=False, default_factory=list)

    @property
    def denoised(self) -> bool:
        """Whether all its forwards are done."""
        return self.step_index >= len(self.sampling.timesteps)

    @property
    def steps_done(self) -> int:
        """Progress in the steps the spec asked for, however many forwards its sampler makes of them."""
        if not self.step_index:
            return 0
        return self.spec.num_inference_steps * self.step_index // len(self.sampling.timesteps)

    @property
    def seconds_per_step(self) -> float | None:
        """Measured; None before its first step."""
        if self.seconds_per_forward is None:
            return None
        return self.seconds_per_forward * len(self.sampling.timesteps) / self.spec.num_inference_steps

    @property
    def seconds_left(self) -> float | None:
        """How long its remaining steps take at the measured pace; None before its first step."""
        if self.seconds_per_forward is None:
            return None
        return self.seconds_per_forward * (len(self.sampling.timesteps) - self.step_index)

    def progress(self, now: float) -> Progress:
        """How far it is, at a time of `time.monotonic`."""
        seconds = None if self.started is None else now - self.started
        return Progress(self.steps_done, self.spec.num_inference_steps, seconds, self.seconds_per_step)

    def note_finite(self, finite: torch.Tensor) -> None:
        """Remember in `first_bad` whether its latents are finite after this step, a bool on any device, unread."""
        before = torch.zeros_like(finite, dtype=torch.int64) if self.first_bad is None else self.first_bad
        self.first_bad = torch.where((before == 0) & ~finite, self.steps_done, before)

    def stepped_at(self, now: float) -> None:
        """Count a forward that ended now."""
        self.step_index += 1
        if self.stepped is not None:
            took, before = now - self.stepped, self.seconds_per_forward
            self.seconds_per_forward = took if before is None else 0.7 * before + 0.3 * took
        self.stepped = now

    def snapshot(self, model_sha256: str) -> Snapshot:
        """Its state between two steps; by the thread that steps it."""
        remembered = vars(self.scheduler) if self.scheduler is not None else {}
        # Schedulers change their lists in place; tensors they replace.
        memory = {key: list(value) if isinstance(value, list) else value for key, value in remembered.items()}
        return Snapshot(
            spec=self.spec,
            model_sha256=model_sha256,
            step_index=self.step_index,
            steps_done=self.steps_done,
            latents=self.latents,
            history=self.history,
            generator=self.generator.get_state(),
            scheduler=memory,
        )


@dataclass(frozen=True)
class Rendered:
    """A finished picture and what made it."""

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
    """From taking its slot to the last pixel; shared with whoever rendered meanwhile."""
    device_seconds: float = 0.0
    """Its own part of that on the device."""
    warnings: tuple[str, ...] = ()
    """What a person should know about the picture, such as a prompt cut at 77 tokens."""
    frames: tuple[Image.Image, ...] = ()
    """For `spec.trajectory`: the picture after each step; the last one is `image`."""

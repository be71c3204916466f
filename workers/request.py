"""A render inside the engine: its state while it runs, and what comes out."""

from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from farm.spec import RenderSpec


@dataclass(eq=False)
class RenderRequest:
    """One job inside the engine, made from its id and its spec.

    `Pipeline.encode` sets all the rest when the request takes its slot. Everything the picture depends on is
    in here, so a request can be moved or written down between any two steps.
    """

    id: str
    spec: RenderSpec

    latents: torch.Tensor = field(init=False, repr=False)
    """float32, (1, channels, height, width) in latent pixels, on the pipeline's device."""
    timesteps: torch.Tensor = field(init=False, repr=False)
    """(forwards,), on the CPU: one entry a forward. Second-order samplers have more than the spec has steps."""
    scheduler: Any = field(init=False, repr=False, default=None)
    """The diffusers noise scheduler of this request alone: its `step` keeps history. None if it has none."""
    generator: torch.Generator = field(init=False, repr=False)
    """On the CPU, so that every device starts from the same noise."""
    conditioning: dict[str, torch.Tensor] = field(init=False, repr=False, default_factory=dict)
    """The denoiser's keyword arguments. First dimension: 2 rows (negative, positive) if guided, else 1."""
    step_index: int = field(init=False, default=0)
    """Forwards already done; the next one is at `timesteps[step_index]`."""
    started: float | None = field(init=False, default=None)
    """When it took its slot, by `time.monotonic`."""
    warnings: list[str] = field(init=False, default_factory=list)

    @property
    def guided(self) -> bool:
        """Whether it needs classifier-free guidance, and so two rows of each forward (Ho & Salimans 2022)."""
        return self.spec.guidance_scale > 1

    @property
    def denoised(self) -> bool:
        """Whether all its forwards are done."""
        return self.step_index >= len(self.timesteps)

    @property
    def steps_done(self) -> int:
        """Progress in the steps the spec asked for, however many forwards its sampler makes of them."""
        if self.started is None or not self.step_index:
            return 0
        return self.spec.num_inference_steps * self.step_index // len(self.timesteps)


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
    warnings: tuple[str, ...] = ()
    """What a person should know about the picture, such as a prompt cut at 77 tokens."""

"""A null pipeline for tests and benchmarks: it draws flat pictures at a set pace, without a model.

`null:` or `null:?seconds_per_step=0.02&width=64&height=64`. The picture is one colour, drawn from the seed and mixed
in equal parts over the steps, so that a missing or extra step changes it. A forward takes `seconds_per_step`, for any
number of requests.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Unpack
from urllib.parse import parse_qsl

import torch

from farm.errors import ModelError
from farm.specs.guidance import UNGUIDED, Guidance
from farm.specs.spec import RenderSpec
from workers.models.checkpoints import Checkpoint, Family
from workers.render.pipeline import Options, Report
from workers.render.request import RenderRequest, Sampling
from workers.sampling import tables

FAMILY = Family("NullPipeline")


@dataclass(frozen=True)
class NullPipeline:
    """A `Pipeline` that draws flat pictures at a set pace."""

    name: str = "null:"
    sha256: str = "0" * 64
    seconds_per_step: float = 0.0
    width: int = 64
    height: int = 64
    most_pixels: int = 0
    """A forward of a larger picture runs out of memory; 0 is no limit."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    nbytes: int = 0
    family: str = "NullPipeline"
    samplers: str = ""
    guidance: Guidance = UNGUIDED
    compiled: bool = False

    @property
    def native_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.width, self.height

    def plan(self, request: RenderRequest) -> tuple[int, ...]:
        """One latent pixel for 8x8 pixels of the picture."""
        steps = request.spec.num_inference_steps
        request.sampling = Sampling(
            name="none",
            timesteps=tuple(float(step) for step in range(steps - 1, -1, -1)),
            init_noise_sigma=1.0,
            make=lambda: None,
            scales=(1.0,) * (steps + 1),
            lags=1,
            weights=((1.0, 1.0 / steps),) * steps,
            draws=(0,) * steps,
        )
        return self._shape(request.spec)

    def _shape(self, spec: RenderSpec) -> tuple[int, ...]:
        return (3, (spec.height or self.height) // 8, (spec.width or self.width) // 8)

    def encode(self, request: RenderRequest) -> None:
        """Start from black."""
        request.generator = torch.Generator("cpu").manual_seed(request.spec.seed)
        request.conditioning = {"colour": colour(request.spec.seed).to(self.device)}
        tables.start(request, torch.zeros(1, *self._shape(request.spec), device=self.device))

    def denoise(self, requests: Sequence[RenderRequest], rows: int | None = None) -> torch.Tensor:
        """Sleep for the time of a forward; each output is the request's colour."""
        time.sleep(self.seconds_per_step)
        if 0 < self.most_pixels < 64 * requests[0].latents[0, 0].numel():
            raise torch.OutOfMemoryError(f"there is no more than {self.most_pixels} pixels")
        return torch.cat([request.conditioning["colour"].expand_as(request.latents) for request in requests])

    def step(self, requests: Sequence[RenderRequest], outputs: torch.Tensor) -> torch.Tensor:
        """Mix in this step's part of the colour."""
        return tables.step(requests, outputs)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Each latent pixel as 8 by 8 pixels."""
        return latents.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)

    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents as they are."""
        return latents

    def forward_bytes(self, spec: RenderSpec) -> int:
        """Unknown."""
        return 0


def colour(seed: int) -> torch.Tensor:
    """The colour that a seed draws: (1, 3, 1, 1), in [0, 1]."""
    return torch.rand(1, 3, 1, 1, generator=torch.Generator("cpu").manual_seed(seed))


def load(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, report: Report, **options: Unpack[Options]
) -> NullPipeline:
    """The null pipeline with a source's parameters. Raises `ModelError` for an unknown one."""
    given = parse_qsl(checkpoint.source.removeprefix("null:").removeprefix("?"), keep_blank_values=True)
    known = {"seconds_per_step": float, "width": int, "height": int, "most_pixels": int}
    try:
        values = {key: known[key](value) for key, value in given}
    except (KeyError, ValueError) as error:
        raise ModelError(f"{checkpoint.source}: takes numbers for {', '.join(known)} ({error})") from error
    return NullPipeline(checkpoint.source, checkpoint.sha256, device=device, dtype=dtype, **values)

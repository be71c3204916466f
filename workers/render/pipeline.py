"""What a model family must offer the engine, and how it is told to load."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypedDict, Unpack

import torch

from farm.specs.spec import RenderSpec
from workers.render.request import RenderRequest

Report = Callable[[str], None]
"""Told, while a model loads, in a few words what is being loaded."""


class Options(TypedDict, total=False):
    """How a pipeline runs, whatever it draws."""

    compile: bool
    """Whether torch.compile makes its denoiser faster, which costs minutes at each new size of a forward."""
    embeddings: int
    """How many texts it remembers the embeddings of; 1024 if left out, 0 is none."""


class Pipeline(Protocol):
    """One loaded model as the engine drives it: encode, then denoise and step by turns, then decode.

    A pipeline keeps no state of a request: what a request needs is in the `RenderRequest`. All calls are made under
    `torch.inference_mode`; `denoise` and `step` by the engine's one thread, the others beside it.
    """

    name: str
    """What messages call it: where it came from."""
    sha256: str
    """The hash of what it renders with; equal hashes, equal weights."""
    family: str
    """The class name diffusers has for it, as in model_index.json."""
    samplers: str
    """Which recipe of a `farm.specs.samplers.Sampler` it takes: `diffusion`, `flow`, or "" for none."""
    device: torch.device
    """Where it computes."""
    dtype: torch.dtype
    """The precision it computes in."""
    compiled: bool
    """Whether each number of rows has a graph of its own, so that forwards are better filled up to known ones."""
    nbytes: int
    """Bytes of device memory its parameters take."""

    @property
    def native_size(self) -> tuple[int, int]:
        """(width, height) in pixels, of a spec that names none."""

    def plan(self, request: RenderRequest) -> tuple[int, ...]:
        """Set the request's rows and sampling; the shape of its latents, without the row dimension.

        Called once a request, before all else, by the thread that submits it. Requests of one pipeline with equal
        shapes may share forwards. Raises `BadRequest` if the model can't draw that size or be sampled so.
        """

    def encode(self, request: RenderRequest) -> None:
        """Set the request's latents, generator, conditioning and warnings, and what `sampling.start` sets.

        Called once a request, before it stands in line. Whatever it raises fails this request alone.
        """

    def denoise(self, requests: Sequence[RenderRequest], rows: int | None = None) -> torch.Tensor:
        """One forward for all of them: their guided outputs, float32, (requests, *shape).

        Called once a forward, with requests of one shape, each at its own timestep. The forward is filled up to `rows`,
        if that is given and more than theirs. Whatever it raises fails none for its neighbours: the engine tries again
        with fewer.
        """

    def step(self, requests: Sequence[RenderRequest], outputs: torch.Tensor) -> torch.Tensor:
        """Replace the requests' latents by those one timestep further, and return them, (requests, *shape).

        The engine counts `step_index` up. Called once a forward for all requests without a `scheduler` of their own,
        and once for each of the others.
        """

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures, float32 in [0, 1], (n, 3, height, width), of (n, *shape) latents; of each alone if it raises."""

    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        """What (n, *shape) latents roughly show, cheaply: like `decode`, but small whatever the picture's size."""

    def forward_bytes(self, spec: RenderSpec) -> int:
        """Bytes of memory that a forward of one request takes at least beside the parameters; 0 if unknown."""


class Load(Protocol):
    """From a source, such as a local folder, to its pipeline on a device."""

    def __call__(
        self,
        source: str,
        device: torch.device,
        dtype: torch.dtype,
        report: Report = ...,
        **options: Unpack[Options],
    ) -> Pipeline:
        """Raises `ModelError` naming what is missing or wrong, or `torch.OutOfMemoryError`."""

"""The interface between the engine and a model family, and how a model is loaded."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypedDict, Unpack

import torch

from farm.specs.guidance import Guidance
from farm.specs.spec import RenderSpec
from workers.render.request import RenderRequest

Report = Callable[[str], None]
"""Called while a model loads, with the name of the part that is being loaded."""


class Options(TypedDict, total=False):
    """How a pipeline runs, independent of its specs."""

    compile: bool
    """Whether torch.compile compiles its denoiser: faster, but each new size of a forward takes minutes first."""
    embeddings: int
    """How many embeddings of texts it keeps; 1024 by default."""


class Pipeline(Protocol):
    """The interface of a loaded model: plan, encode, then denoise and step in turn, then decode.

    A pipeline stores no state of a request; the `RenderRequest` does. All calls are made under
    `torch.inference_mode`: `denoise` and `step` in the engine's thread, the others beside it.
    """

    name: str
    """Its source, for messages."""
    sha256: str
    """The hash of its weights and configs: equal hashes, equal pictures."""
    family: str
    """The class name diffusers has for it, as in model_index.json."""
    samplers: str
    """Which recipe of a `farm.specs.samplers.Sampler` it takes: `diffusion`, `flow`, or "" for none."""
    device: torch.device
    """Where it computes."""
    dtype: torch.dtype
    """The precision it computes in."""
    compiled: bool
    """Whether each number of rows needs a graph of its own: forwards are filled up to a known number then."""
    nbytes: int
    """Bytes of device memory its parameters take."""

    @property
    def native_size(self) -> tuple[int, int]:
        """(width, height) in pixels, for a spec without a size."""

    @property
    def guidance(self) -> Guidance:
        """The condition for guidance, for estimates of memory and time without the model."""

    def plan(self, request: RenderRequest) -> tuple[int, ...]:
        """Set the request's rows, text tokens and sampling; returns the shape of its latents, without rows.

        Called first, once for each request, by the thread that submits it. Requests of one pipeline with equal shapes
        and text tokens may share forwards. Raises `BadRequest` if the model can't draw that size, or lacks what the
        spec asks for.
        """

    def encode(self, request: RenderRequest) -> None:
        """Set the request's latents, generator, conditioning and warnings.

        Called once for each request, before it enters the queue. An exception fails this request alone.
        """

    def denoise(self, requests: Sequence[RenderRequest], rows: int | None = None) -> torch.Tensor:
        """One forward for all requests: their guided outputs, float32, (requests, *shape).

        Called with requests of one shape, each at its own timestep. The forward is padded to `rows`, if that exceeds
        theirs. After an exception the engine tries again with fewer requests.
        """

    def step(self, requests: Sequence[RenderRequest], outputs: torch.Tensor) -> torch.Tensor:
        """Replace the requests' latents by those of the next timestep, and return them, (requests, *shape).

        Called once for all requests of a forward without a `scheduler` of their own, and once for each of the others.
        The engine increments `step_index`.
        """

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures, float32 in [0, 1], (n, 3, height, width), of (n, *shape) latents.

        After an exception the engine decodes each picture alone.
        """

    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        """Small, rough pictures of (n, *shape) latents, in the form of `decode`, at a constant cost."""

    def forward_bytes(self, spec: RenderSpec) -> int:
        """The least bytes of memory that a forward of one request takes beside the parameters; 0 if unknown."""


class Load(Protocol):
    """Loads the pipeline of a source, such as a local folder, onto a device."""

    def __call__(
        self,
        source: str,
        device: torch.device,
        dtype: torch.dtype,
        report: Report = ...,
        **options: Unpack[Options],
    ) -> Pipeline:
        """Raises `ModelError` naming what is missing or wrong, or `torch.OutOfMemoryError`."""

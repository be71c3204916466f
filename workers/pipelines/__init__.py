"""What a model family must offer the engine, and how a model's source becomes one."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Protocol, Unpack

import torch

from farm.spec import RenderSpec
from workers.checkpoints import open_checkpoint
from workers.loading import Options, Report, quiet
from workers.request import RenderRequest


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
    """Which recipe of a `farm.samplers.Sampler` it takes: `diffusion`, `flow`, or nothing if it has no samplers."""
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


@cache
def families() -> Mapping[str, ModuleType]:
    """The modules beside this one that render a family of checkpoints, by `_class_name` of its model_index.json.

    A module is a family if it has a `FAMILY` and a `load`: a new one costs one file.
    """
    with quiet():
        modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
    return {module.FAMILY.name: module for module in modules if hasattr(module, "FAMILY")}


def load(
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    report: Report = lambda _: None,
    **options: Unpack[Options],
) -> Pipeline:
    """The pipeline of a source: a local folder, a hub id, or `null:` (see `workers.null`).

    On the device `meta` it has no weights, but what its configs say, and serves to tell what a forward takes. Raises
    `ModelError` naming what is missing or wrong, or `torch.OutOfMemoryError`.
    """
    from workers import null

    # The other families take seconds to import.
    modules = {null.FAMILY.name: null} if source.startswith("null:") else families()
    known = {name: module.FAMILY for name, module in modules.items()}
    checkpoint = open_checkpoint(source, known, weights=device.type != "meta")
    pipeline: Pipeline = modules[checkpoint.family].load(checkpoint, device, dtype, report, **options)
    return pipeline

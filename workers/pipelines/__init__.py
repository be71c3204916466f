"""What a model family must offer the engine, and how a model's source becomes one."""

from importlib import import_module
from typing import Protocol

import torch

from farm.spec import RenderSpec
from workers.checkpoints import FAMILIES, open_checkpoint
from workers.request import RenderRequest


class Pipeline(Protocol):
    """One loaded model as the engine drives it: encode, then denoise and step by turns, then decode.

    The engine's one thread makes all calls of the four verbs, under `torch.inference_mode`. A pipeline keeps no
    state of a request: what a request needs is in the `RenderRequest`.
    """

    @property
    def name(self) -> str:
        """What messages call it: where it came from."""
        ...

    @property
    def sha256(self) -> str:
        """The hash of what it renders with; equal hashes, equal weights."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The precision it computes in."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of device memory its parameters take."""
        ...

    @property
    def native_size(self) -> tuple[int, int]:
        """(width, height) in pixels, of a spec that names none."""
        ...

    def latent_shape(self, spec: RenderSpec) -> tuple[int, ...]:
        """The shape of one request's latents, without the row dimension, at the spec's size or the model's own.

        Called once a request, by the thread that submits it. Requests of one pipeline with equal shapes may share
        forwards. Raises `BadRequest` if the model can't draw that size.
        """
        ...

    def encode(self, request: RenderRequest) -> None:
        """Set the request's latents, timesteps, scheduler, generator, conditioning and warnings.

        Called once a request, when it takes its slot. Whatever it raises fails this request alone.
        """
        ...

    def denoise(self, requests: list[RenderRequest]) -> list[torch.Tensor]:
        """One forward for all of them: guided model outputs, float32, each shaped like its request's latents.

        Called once a forward, with requests of one shape, each at its own timestep. Whatever it raises fails
        all of them.
        """
        ...

    def step(self, request: RenderRequest, output: torch.Tensor) -> None:
        """Replace the request's latents by those one timestep further; the engine counts `step_index` up.

        Called once a request and forward. Whatever it raises fails this request alone.
        """
        ...

    def decode(self, requests: list[RenderRequest]) -> torch.Tensor:
        """Their pictures, float32 in [0, 1], (requests, 3, height, width) in pixels.

        Called with those that finish at the same step; if it raises, once more for each alone.
        """
        ...


def load(source: str, device: torch.device, dtype: torch.dtype) -> Pipeline:
    """The pipeline of a source: a local folder, a hub id, or `null:` (see `workers.pipelines.null`).

    Raises `ModelError` naming what is missing or wrong.
    """
    checkpoint = open_checkpoint(source)
    family = import_module(FAMILIES[checkpoint.family].module)
    pipeline: Pipeline = family.load(checkpoint, device, dtype)
    return pipeline

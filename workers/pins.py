"""Which models are loaded, within a memory budget."""

import logging
import time
from collections.abc import Mapping
from typing import Self

import torch

from farm.errors import ModelError
from workers.pipelines import Pipeline, load

log = logging.getLogger(__name__)


class Pins:
    """The models a worker holds, by the names jobs call them."""

    def __init__(self, pipelines: Mapping[str, Pipeline]) -> None:
        self._pipelines = dict(pipelines)

    @classmethod
    def load(
        cls,
        sources: Mapping[str, str],
        device: torch.device,
        dtype: torch.dtype,
        memory_bytes: int | None = None,
    ) -> Self:
        """Load every model of {name: source}, in that order, and keep it.

        `memory_bytes` bounds the parameters of all of them together; None leaves it to the device. Raises
        `ModelError` naming the model that can't be loaded or does not fit.
        """
        pipelines: dict[str, Pipeline] = {}
        for name, source in sources.items():
            started = time.monotonic()
            try:
                pipelines[name] = load(source, device, dtype)
            except torch.OutOfMemoryError as error:
                raise _no_room(name, pipelines, str(error)) from error
            except ModelError as error:
                raise ModelError(f"model {name!r}: {error}") from error
            used = sum(pipeline.nbytes for pipeline in pipelines.values())
            if memory_bytes is not None and used > memory_bytes:
                raise _no_room(name, pipelines, f"{used:,} bytes are more than the {memory_bytes:,} allowed")
            log.info(
                "pinned model=%s bytes=%d seconds=%.1f sha256=%s",
                name,
                pipelines[name].nbytes,
                time.monotonic() - started,
                pipelines[name].sha256[:12],
            )
        return cls(pipelines)

    @property
    def names(self) -> tuple[str, ...]:
        """The models held, in the order they were loaded."""
        return tuple(self._pipelines)

    @property
    def memory_used(self) -> dict[str, int]:
        """Bytes of parameters, by model."""
        return {name: pipeline.nbytes for name, pipeline in self._pipelines.items()}

    def get(self, name: str) -> Pipeline:
        """The pipeline of that model. Raises `ModelError` if it is not held."""
        try:
            return self._pipelines[name]
        except KeyError:
            held = ", ".join(self._pipelines) or "none"
            raise ModelError(f"model {name!r} is not held here; held: {held}") from None


def _no_room(name: str, held: Mapping[str, Pipeline], reason: str) -> ModelError:
    beside = ", ".join(f"{other} ({held[other].nbytes:,} bytes)" for other in held if other != name) or "nothing"
    return ModelError(f"model {name!r} does not fit beside {beside}: {reason}; pin fewer or smaller models")

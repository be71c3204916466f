"""The worker's description of its models and of its device's memory, for publishing."""

import logging
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch

from farm.errors import FarmError
from farm.jobs.served_models import DeviceMemory, MemoryLimit, ServedModel
from farm.specs.spec import RenderSpec
from workers.models.memory_limit import memory_limit
from workers.models.opener import Opener
from workers.models.pins import Pins
from workers.render.device import memory

log = logging.getLogger(__name__)

_SHARES = 100
"""The memory used is rounded to hundredths of the total, so that small changes are not written to the database."""


class Served:
    """The models and the memory at the last `refresh`. All methods may be called from any thread."""

    def __init__(self, pins: Pins, opener: Opener, device: torch.device) -> None:
        """Find the largest picture of each model by tracing. Loads no weights."""
        self._pins, self._opener, self._device = pins, opener, device
        self._lock = threading.Lock()
        self.memory: DeviceMemory | None = _rounded(memory(device))
        """None if the device does not tell."""
        self._models: Mapping[str, ServedModel] = {name: self._traced(name) for name in pins.names}
        self.refresh()

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """The models, in the order of `FARM_MODELS`."""
        return tuple(self._models.values())

    def refresh(self) -> None:
        """Update the loaded models and the memory in use."""
        loaded, now = self._pins.held, _rounded(memory(self._device))
        with self._lock:
            self._models = {
                name: replace(self._opener.loaded.get(name, model), loaded=name in loaded, limit=model.limit)
                for name, model in self._models.items()
            }
            self.memory = now

    def allows(self, spec: RenderSpec) -> bool:
        """Whether the device may have enough memory for a picture."""
        model = self._models.get(spec.model)
        return model is None or model.limit is None or model.limit.allows(spec)

    def forbid(self, spec: RenderSpec) -> None:
        """Refuse pictures of this size or larger until a restart, after a forward of this size ran out of memory alone.

        Does nothing if its model is no longer loaded.
        """
        if spec.model not in self._pins.held:
            return
        with self._pins.using(spec.model) as pipeline:
            (width, height), guidance = pipeline.native_size, pipeline.guidance
        cost = (spec.width or width) * (spec.height or height) * guidance.factor_of(spec)
        limit = MemoryLimit.below(cost, width * height, guidance)
        with self._lock:
            model = self._models[spec.model]
            lower = limit if model.limit is None else limit.lowered_to(model.limit)
            self._models = {**self._models, model.name: replace(model, limit=lower)}

    def _traced(self, name: str) -> ServedModel:
        """A model with its size limit, traced without weights if it is not loaded; no limit if tracing fails."""
        model = ServedModel(name)
        try:
            loaded = name in self._pins.held
            with self._pins.using(name) if loaded else nullcontext(self._opener.outline(name)) as pipeline:
                model = replace(model, guidance=pipeline.guidance)
                limit = None if self.memory is None else memory_limit(pipeline, self.memory.total)
        except Exception as error:
            trace = not isinstance(error, FarmError)
            log.warning("can't tell how large a picture of model=%s may be: %s", name, error, exc_info=trace)
            return model
        if limit is not None:
            log.info("no memory for pictures of model=%s beyond %d pixels, rows counted", name, limit.pixels)
        return replace(model, limit=limit)


def _rounded(now: tuple[int, int] | None) -> DeviceMemory | None:
    if now is None:
        return None
    used, total = now
    return DeviceMemory(min(total, total * round(_SHARES * used / max(1, total)) // _SHARES), total)

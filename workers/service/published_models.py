"""What a worker publishes of its models: which it holds, and how large a picture each has memory for."""

import logging
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from farm.errors import FarmError, ServiceUnavailable
from farm.jobs.memory import MOST, OWN_ROWS, Room, room_of
from farm.jobs.records import WorkerInfo
from farm.jobs.store import JobStore
from farm.specs.spec import RenderSpec
from workers.models.description import standing
from workers.models.memory_bound import room_for
from workers.models.opener import Opener
from workers.models.pins import Pins
from workers.render.device import memory

log = logging.getLogger(__name__)


class PublishedModels:
    """The description of a worker and its models in SQL, kept up to date. All methods may be called from any thread."""

    def __init__(self, store: JobStore, info: WorkerInfo, pins: Pins, opener: Opener, device: torch.device) -> None:
        """Describe the models of `pins`; `info` is the worker without them. Nothing is published yet."""
        self._store, self._pins, self._opener, self._device = store, pins, opener, device
        self._lock = threading.Lock()
        self.info = replace(info, models=self._describe())
        """The worker with its models, as they are now."""
        self._published: WorkerInfo | None = None

    def publish(self) -> None:
        """Update SQL if the held models or the device's memory have changed, or the last update failed."""
        held, memory_now = self._pins.held, memory(self._device)
        with self._lock:
            self.info = replace(self.info, models=standing(self.info.models, self._opener.loaded, held, memory_now))
        try:
            self._update()
        except ServiceUnavailable as error:
            log.error("can't publish the models: %s", error)

    def has_room(self, spec: RenderSpec) -> bool:
        """Whether the device may have memory for a picture of that size."""
        with self._lock:
            room = next((room_of(model) for model in self.info.models if model["name"] == spec.model), None)
        return room is None or room.has(spec)

    def no_room(self, spec: RenderSpec) -> None:
        """Publish that the device has no memory for a picture of that size, until this worker is restarted."""
        if spec.model not in self._pins.held:
            return
        with self._pins.using(spec.model) as pipeline:
            width, height = pipeline.native_size
        most = spec.row_pixels(spec.width or width, spec.height or height) - 1
        rows = most // (width * height)
        with self._lock:
            models = [
                {**model, MOST: min(most, model.get(MOST, most)), OWN_ROWS: min(rows, model.get(OWN_ROWS, rows))}
                if model["name"] == spec.model
                else model
                for model in self.info.models
            ]
            self.info = replace(self.info, models=tuple(models))
        self._update()

    def _update(self) -> None:
        with self._lock:
            info = self.info
        if info != self._published:
            self._store.describe(info)
            self._published = info

    def _describe(self) -> tuple[Mapping[str, Any], ...]:
        held, memory_now = self._pins.held, memory(self._device)
        models: list[dict[str, object]] = []
        for name in self._pins.names:
            room = self._room(name, memory_now[1]) if memory_now else None
            models.append({"name": name, **({MOST: room.most, OWN_ROWS: room.own_rows} if room else {})})
        return standing(models, self._opener.loaded, held, memory_now)

    def _room(self, name: str, there_is: int) -> Room | None:
        """What a model has room for, traced without its weights if it is not held; None if all, or unknown."""
        try:
            held = name in self._pins.held
            with self._pins.using(name) if held else nullcontext(self._opener.outline(name)) as pipeline:
                room = room_for(pipeline, there_is)
        except Exception as error:
            trace = not isinstance(error, FarmError)
            log.warning("can't tell how large a picture of model=%s may be: %s", name, error, exc_info=trace)
            return None
        if room is not None:
            log.info("no memory for pictures of model=%s beyond %d pixels, rows counted", name, room.most)
        return room

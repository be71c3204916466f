"""Loads a worker's models from their sources: a local folder, the hub, or the object store."""

import logging
import threading
from pathlib import Path

import torch

from farm.errors import ModelError
from farm.jobs.served_models import ServedModel
from farm.objects.model_store import parse_reference
from farm.objects.storage import Storage
from farm.settings import Settings
from workers import tiny
from workers.models.cache import ModelCache
from workers.models.remote import FARM, is_remote
from workers.render.pipeline import Load, Options, Pipeline

log = logging.getLogger(__name__)


def model_sources(models: str) -> dict[str, str]:
    """Name and source of each model of a list like `tiny,sd15=/models/sd15,org/name,farm:sdxl,s3://bucket/prefix`.

    A source is a hub id, a folder, `farm:name` or `farm:name@version` of a pushed model, an `s3://` prefix, or `tiny`.
    The default name is the hub id, the pushed model's name, or the last part of a folder or prefix. Raises
    `ModelError`.
    """
    found: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in models.split(","))):
        name, given, source = entry.partition("=")
        if not given or name.startswith("null:"):
            source = entry
            is_place = "://" in entry or Path(entry).expanduser().is_dir()
            name = entry.partition(":")[0] if entry.startswith("null:") else entry
            name = parse_reference(entry.removeprefix(FARM))[0] if entry.startswith(FARM) else name
            name = name.rstrip("/").rpartition("/")[2] if is_place and entry != "tiny" else name
        if not name or not source:
            raise ModelError(f"{entry!r} is not name=source")
        if name in found:
            raise ModelError(f"two models are called {name!r}")
        found[name] = source
    if not found:
        raise ModelError("no models to pin: FARM_MODELS is empty")
    return found


def weights_bytes(source: str) -> int:
    """The size of a model's weights on this machine's disk; 0 for any other source."""
    folder = Path(source).expanduser()
    return sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))


class Opener:
    """Loads the models of `FARM_MODELS` onto this worker's device."""

    def __init__(
        self,
        settings: Settings,
        storage: Storage,
        load: Load,
        device: torch.device,
        dtype: torch.dtype,
        stopping: threading.Event,
    ) -> None:
        """Loads nothing yet; `load` is `workers.pipelines.load`. Raises `ModelError` for an invalid list of models."""
        self._load = load
        named = model_sources(settings.models)
        self.sources = {name: str(tiny.WEIGHTS) if source == "tiny" else source for name, source in named.items()}
        """Source by name, in the order given."""
        self.loaded: dict[str, ServedModel] = {}
        """Every model that was ever loaded, without a limit."""
        self._device, self._dtype = device, dtype
        self._options = Options(compile=settings.compile and device.type == "cuda", embeddings=settings.embeddings)
        self._cache = ModelCache(settings.model_cache, storage, settings.model_cache_size, stopping)

    def open(self, name: str, source: str) -> Pipeline:
        """Load a model. Raises `ModelError`, or `torch.OutOfMemoryError`."""

        def report(part: str) -> None:
            log.info("loading model=%s %s", name, part)

        def loaded(folder: str) -> Pipeline:
            return self._load(folder, self._device, self._dtype, report, **self._options)

        pipeline = self._cache.load(source, loaded)
        self.loaded[name] = ServedModel(
            name,
            loaded=True,
            sha256=pipeline.sha256,
            bytes=pipeline.nbytes,
            family=pipeline.family,
            samplers=pipeline.samplers,
            guidance=pipeline.guidance,
        )
        return pipeline

    def outline(self, name: str) -> Pipeline:
        """A model without its weights, for tracing only. Raises `FarmError`."""
        meta = torch.device("meta")
        return self._cache.load_configs(
            self.sources[name], lambda folder: self._load(folder, meta, self._dtype, **self._options)
        )

    def weights_bytes(self, source: str) -> int:
        """The size of a model's weights, if that is known before it is loaded; else 0."""
        return self._cache.weights_bytes(source) if is_remote(source) else weights_bytes(source)

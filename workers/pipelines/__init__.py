"""The model families, one file each, selected by the class name in a checkpoint's model_index.json."""

import logging
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Unpack

import torch

from farm.errors import FarmError, ModelError
from workers.models.checkpoints import open_checkpoint
from workers.pipelines.loading import quiet
from workers.render.failures import caused
from workers.render.pipeline import Options, Pipeline, Report

log = logging.getLogger(__name__)


@cache
def families() -> Mapping[str, ModuleType]:
    """The modules of this package with a `FAMILY` and a `load`, by `_class_name` of its model_index.json."""
    with quiet():
        # No checkpoint is a null pipeline, which is for tests and benchmarks.
        names = [found.name for found in iter_modules(__path__) if found.name != "null"]
        modules = [import_module(f"{__name__}.{name}") for name in names]
    return {module.FAMILY.name: module for module in modules if hasattr(module, "FAMILY")}


def load(
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    report: Report = lambda _: None,
    **options: Unpack[Options],
) -> Pipeline:
    """The pipeline of a source: a local folder, a hub id, or `null:` (see `workers.pipelines.null`).

    On the device `meta` it is made from its configs, without weights, and can only be traced. Raises
    `torch.OutOfMemoryError`, and a `ModelError` with its cause for every other error.
    """
    from workers.pipelines import null

    what = source
    try:
        # The other families take seconds to import.
        modules = {null.FAMILY.name: null} if source.startswith("null:") else families()
        known = {name: module.FAMILY for name, module in modules.items()}
        checkpoint = open_checkpoint(source, known, weights=device.type != "meta")
        what = f"{checkpoint.path} ({checkpoint.family})"
        pipeline: Pipeline = modules[checkpoint.family].load(checkpoint, device, dtype, report, **options)
    except (FarmError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        log.debug("%s can't be loaded", what, exc_info=True)
        raise caused(ModelError(f"{what} can't be loaded: {type(error).__name__}: {error}"), error) from error
    return pipeline

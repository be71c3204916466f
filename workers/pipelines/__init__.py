"""The model families: a file each, found by the class name in a checkpoint's model_index.json."""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Unpack

import torch

from workers.models.checkpoints import open_checkpoint
from workers.pipelines.loading import quiet
from workers.render.pipeline import Options, Pipeline, Report


@cache
def families() -> Mapping[str, ModuleType]:
    """The modules beside this one that render a family of checkpoints, by `_class_name` of its model_index.json.

    A module is a family if it has a `FAMILY` and a `load`: a new one costs one file.
    """
    with quiet():
        # The null pipeline is for tests and benchmarks: no checkpoint is one.
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

    On the device `meta` it has no weights, but what its configs say, and serves to tell what a forward takes. Raises
    `ModelError` naming what is missing or wrong, or `torch.OutOfMemoryError`.
    """
    from workers.pipelines import null

    # The other families take seconds to import.
    modules = {null.FAMILY.name: null} if source.startswith("null:") else families()
    known = {name: module.FAMILY for name, module in modules.items()}
    checkpoint = open_checkpoint(source, known, weights=device.type != "meta")
    pipeline: Pipeline = modules[checkpoint.family].load(checkpoint, device, dtype, report, **options)
    return pipeline

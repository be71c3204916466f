"""What `tests.forked` imports once, in the process from which it forks; `gc.freeze` keeps its memory shared."""

import contextlib
import gc
import importlib

for name in (
    "farm.cli.main",
    "farm.cli.operate",
    "farm.client.farm",
    "farm.dispatch.dispatcher",
    "farm.dispatch.metrics",
    "diffusers",
    "transformers",
    "workers.consumer.serve",
    "workers.pipelines",
):
    with contextlib.suppress(ModuleNotFoundError):  # a client's environment lacks torch
        importlib.import_module(name)

gc.collect()
gc.freeze()

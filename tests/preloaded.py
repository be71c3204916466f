"""What `tests.forked` imports once, in the process from which it forks; `gc.freeze` keeps its memory shared."""

import contextlib
import gc
import importlib

# Not `farm.cli`: a console reads its width from the environment while it is imported.
for name in (
    "typer",
    "rich.progress",
    "rich.table",
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

"""Loads a checked checkpoint as diffusers' pipeline on its device."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from workers.models.checkpoints import Checkpoint
from workers.render.pipeline import Report

log = logging.getLogger(__name__)

_GRAPHS = 1024
"""How many graphs torch.compile keeps for the code of one block: one for each width of a UNet and size of a forward."""


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' warnings about image processors, which diffusers imports and no family uses."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_pipe(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, report: Report) -> Any:
    """The diffusers pipeline of a checked checkpoint on the device, its parts loaded one after the other.

    On the device `meta` they are loaded without weights. Raises the libraries' errors and `torch.OutOfMemoryError`.
    """
    import diffusers  # imported here: they take seconds
    import transformers
    from diffusers.utils import is_accelerate_available

    kind = getattr(diffusers, checkpoint.family)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    index = diffusers.DiffusionPipeline.load_config(checkpoint.path)
    parts: dict[str, Any] = {}
    for place, part in enumerate(checkpoint.parts, 1):
        report(f"{part}, {place} of {len(checkpoint.parts)}")
        library, name = index[part]
        loader = getattr(import_module(library), name)
        weights = hasattr(loader, "forward")
        if weights and device.type == "meta":
            loaded = _outline(loader, checkpoint.path / part, dtype)
        else:
            options = {"dtype": dtype, "use_safetensors": True} if weights else {}
            if library == "diffusers" and weights:
                options["low_cpu_mem_usage"] = is_accelerate_available()
            loaded = loader.from_pretrained(checkpoint.path / part, local_files_only=True, **options)
        if weights and library == "diffusers" and loaded.dtype != dtype:
            loaded = loaded.to(dtype)  # SD3's transformer ignores the option, without accelerate
        parts[part] = loaded.to(device).eval() if weights else loaded
    expected, _ = kind._get_signature_keys(kind)  # noqa: SLF001 - it has no public form
    parts = {**dict.fromkeys(expected), **parts}
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False
    return kind.from_pretrained(checkpoint.path, local_files_only=True, low_cpu_mem_usage=False, **parts)


def compile_blocks(denoiser: Any) -> bool:
    """Compile the repeated blocks of a denoiser with torch.compile; False, with a log line, if there are none.

    Compiling only these takes a minute instead of ten. Each forward size gets its own graph, since sizes are measured.
    """
    repeated = getattr(denoiser, "_repeated_blocks", None) or ()
    if all(type(module).__name__ not in repeated for module in denoiser.modules()):
        log.warning("not compiled: diffusers names no repeated blocks in %s", type(denoiser).__name__)
        return False
    denoiser.compile_repeated_blocks(fullgraph=True, dynamic=False, recompile_limit=_GRAPHS)
    return True


def _outline(loader: Any, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """A part made from its config on the device `meta`: its tensors have shapes and no data."""
    with torch.device("meta"):
        if hasattr(loader, "from_config"):
            outline: torch.nn.Module = loader.from_config(loader.load_config(folder, local_files_only=True))
        else:
            outline = loader(loader.config_class.from_pretrained(folder, local_files_only=True))
    return torch.nn.Module.to(outline, dtype)  # diffusers' own method warns about lost precision

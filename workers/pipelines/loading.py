"""From a checked checkpoint to diffusers' pipeline on its device."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from farm.errors import ModelError
from workers.models.checkpoints import Checkpoint
from workers.render.pipeline import Report


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of transformers': of what image processors lack, which diffusers imports and no family uses."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_pipe(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, report: Report) -> Any:
    """The pipeline of a checked checkpoint on the device, its parts loaded one after the other.

    On the device `meta` they are loaded without weights. Raises `ModelError`, or `torch.OutOfMemoryError` if the
    device has no room for it.
    """
    import diffusers  # here, since they take seconds, and who renders nothing needs neither
    import transformers
    from diffusers.utils import is_accelerate_available

    kind = getattr(diffusers, checkpoint.family)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    index = diffusers.DiffusionPipeline.load_config(checkpoint.path)
    parts: dict[str, Any] = {}
    try:
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
        expected, _ = kind._get_signature_keys(kind)  # noqa: SLF001 - nothing else says what it wants to be given
        parts = {**dict.fromkeys(expected), **parts}
        if "safety_checker" in parts:
            parts["requires_safety_checker"] = False
        pipe = kind.from_pretrained(checkpoint.path, local_files_only=True, low_cpu_mem_usage=False, **parts)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(f"{checkpoint.path} can't be loaded: {error}") from error
    return pipe


def _outline(loader: Any, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """A part as its config has it, on the device `meta`: tensors with shapes and nothing in them."""
    with torch.device("meta"):
        if hasattr(loader, "from_config"):
            outline: torch.nn.Module = loader.from_config(loader.load_config(folder, local_files_only=True))
        else:
            outline = loader(loader.config_class.from_pretrained(folder, local_files_only=True))
    return torch.nn.Module.to(outline, dtype)  # diffusers' own warns of what weights could lose

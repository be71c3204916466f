"""Where to render, and in which precision."""

import torch

from farm.errors import ModelError


def choose_device(device: str | None = None) -> torch.device:
    """The device of that name (`cuda`, `cuda:1`, `cpu`); None is the first GPU, or else the CPU.

    Raises `ModelError` if there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ModelError(f"no device {device!r} to render on: {reason}") from error
    return chosen


def choose_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The precision the models run in: `float32`, `float16` or `bfloat16`.

    None is float32 on the CPU; on a GPU bfloat16, or float16 where the chip has no bfloat16.
    Latents, guidance and noise schedulers stay in float32 whatever this is. Raises `ModelError`.
    """
    if dtype is None:
        if device.type == "cpu":
            return torch.float32
        supported = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if supported else torch.float16
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise ModelError(f"no precision {dtype!r}; known are {', '.join(known)}")
    return known[dtype]

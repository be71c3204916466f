"""Serializes the state of a running request: tensors as safetensors, the rest as JSON in its header."""

import json
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from farm.specs.spec import RenderSpec
from workers.render.request import Snapshot

VERSION = 1


def pack(snapshot: Snapshot) -> bytes:
    """The bytes of a safetensors file; copies tensors from the GPU."""
    tensors = {"latents": snapshot.latents, "generator": snapshot.generator}
    tensors |= {f"history.{place}": tensor for place, tensor in enumerate(snapshot.history)}
    header = {
        "version": VERSION,
        "spec": json.loads(snapshot.spec.to_json()),
        "model_sha256": snapshot.model_sha256,
        "step_index": snapshot.step_index,
        "steps_done": snapshot.steps_done,
        "history": len(snapshot.history),
        "scheduler": _flattened(snapshot.scheduler, "scheduler", tensors),
    }
    # Cloned: a view would save the whole tensor of its forward.
    packed: bytes = save(
        {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()},
        {"state": json.dumps(header)},
    )
    return packed


def unpack(data: bytes) -> Snapshot:
    """The snapshot that `pack` wrote. Raises `ValueError` for other data or another version."""
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["state"])
        if header["version"] != VERSION:
            raise ValueError(f"a state of version {header['version']}, this is {VERSION}")
        return Snapshot(
            spec=RenderSpec.model_validate(header["spec"]),
            model_sha256=header["model_sha256"],
            step_index=int(header["step_index"]),
            steps_done=int(header["steps_done"]),
            latents=tensors["latents"],
            history=tuple(tensors[f"history.{place}"] for place in range(header["history"])),
            generator=tensors["generator"],
            scheduler=_restored(header["scheduler"], tensors),
        )
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"not a render's state: {error!r}") from error


def _flattened(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A noise scheduler's attributes as JSON, tensors under their path; config and code are left out."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, np.ndarray):
        tensors[path] = torch.from_numpy(value)
        return {"array": path}
    if isinstance(value, list):
        return [_flattened(item, f"{path}.{place}", tensors) for place, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if type(value) is dict:
        flat = {str(key): _flattened(item, f"{path}.{key}", tensors) for key, item in value.items() if key[0] != "_"}
        memory = {key: item for key, item in flat.items() if item is not None}
        # the only private attributes that the next step needs
        steps = {key: {"value": value[key]} for key in ("_step_index", "_begin_index") if key in value}
        return {"dict": {**memory, **steps}}
    return None


def _restored(flat: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(flat, list):
        return [_restored(item, tensors) for item in flat]
    if "tensor" in flat:
        return tensors[flat["tensor"]]
    if "array" in flat:
        return tensors[flat["array"]].numpy()
    if "dict" in flat:
        return {key: _restored(item, tensors) for key, item in flat["dict"].items()}
    return flat["value"]

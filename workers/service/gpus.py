"""Lists the GPUs of this machine with `nvidia-smi`, and selects those of `--gpus`.

torch would take memory on each GPU to list them. nvidia-ml-py would not, but a hung driver would block this process
forever; a subprocess has a time limit.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from farm.errors import NotConfigured

_GPU = re.compile(r"GPU (\d+): .*\(UUID: (GPU-[\w-]+)\)")
_MIG = re.compile(r"\s+MIG .*\sDevice\s+(\d+): \(UUID: (MIG-[\w/-]+)\)")


@dataclass(frozen=True)
class Gpu:
    """A GPU or a MIG instance."""

    name: str
    """`gpu0`, or `gpu0-mig1`: stable across restarts."""
    id: str
    """Its value for `CUDA_VISIBLE_DEVICES`."""


def listed(text: str) -> list[Gpu]:
    """The GPUs in the output of `nvidia-smi -L`; a GPU split into MIG instances is replaced by them.

    Their ids are UUIDs, since CUDA numbers GPUs by speed and nvidia-smi by bus.
    """
    found: list[Gpu] = []
    whole: Gpu | None = None
    for line in text.splitlines():
        if gpu := _GPU.match(line):
            whole = Gpu(f"gpu{gpu[1]}", gpu[2])
            found.append(whole)
        elif whole is not None and (mig := _MIG.match(line)):
            if found[-1] is whole:
                found.pop()
            found.append(Gpu(f"{whole.name}-mig{mig[1]}", mig[2]))
    return found


def here(environ: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that `CUDA_VISIBLE_DEVICES` in an environment leaves visible; raises `NotConfigured` if none."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        found = _ask_driver()
        if not found:
            raise NotConfigured(
                "no NVIDIA GPU is here that nvidia-smi lists: install the driver, in a container give it the GPUs, or "
                "name them in CUDA_VISIBLE_DEVICES; --workers N renders on the CPU"
            )
        return found
    ids = [entry.strip() for entry in visible.split(",")]
    ids = ids[: next((place for place, entry in enumerate(ids) if entry in ("", "-1")), len(ids))]  # like CUDA
    if not ids:
        raise NotConfigured("CUDA_VISIBLE_DEVICES hides every GPU: unset it, or render on the CPU with --workers N")
    names = {gpu.id: gpu.name for gpu in _ask_driver()} if not all(map(str.isdigit, ids)) else {}
    return [Gpu(_name(entry, names), entry) for entry in ids]


def chosen(wanted: str, gpus: Sequence[Gpu]) -> list[Gpu]:
    """The GPUs chosen by `all`, by a count, or by a list of positions such as `0,2`; `2,` is a single position.

    Raises `NotConfigured`.
    """
    if wanted == "all":
        return list(gpus)
    try:
        if "," not in wanted:
            places = list(range(int(wanted)))
        else:
            places = [int(place) for place in wanted.split(",") if place.strip()]
    except ValueError:
        raise NotConfigured(f"--gpus {wanted!r}: all, a number of them, or a list such as 0,2") from None
    if any(not 0 <= place < len(gpus) for place in places):
        raise NotConfigured(f"--gpus {wanted}: there are {len(gpus)} here: {', '.join(gpu.name for gpu in gpus)}")
    if not places:
        raise NotConfigured(f"--gpus {wanted}: at least one")
    if len(set(places)) < len(places):
        raise NotConfigured(f"--gpus {wanted}: a GPU is listed twice")
    return [gpus[place] for place in places]


def _ask_driver() -> list[Gpu]:
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotConfigured(f"nvidia-smi does not say which GPUs are here: {error}") from error
    if said.returncode:
        why = " ".join((said.stdout + said.stderr).split())
        raise NotConfigured(f"nvidia-smi does not say which GPUs are here: {why}")
    return listed(said.stdout)


def _name(entry: str, names: Mapping[str, str]) -> str:
    if entry.isdigit():
        return f"gpu{entry}"
    for uuid, name in names.items():  # CUDA accepts a prefix of a UUID too
        if uuid.startswith(entry):
            return name
    return re.sub(r"[^\w-]", "-", entry.lower())[:24]

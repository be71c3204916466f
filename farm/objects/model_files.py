"""The files of a checkpoint, and the manifest with their hashes; no pickles, no code."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from farm.errors import ModelError

INDEX = "model_index.json"
MANIFEST = "farm-model.json"
"""The manifest's file name, beside a checkpoint's `model_index.json`."""
CONFIGS = ("*.json", "*.txt", "*.model")
# Exact names exclude other variants (fp16, non_ema): gigabytes that are never loaded.
WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-*-of-*.safetensors",
)
SHARD_INDEXES = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
"""The files from which the libraries read the names of shards."""
LIBRARIES = ("diffusers", "transformers")

_NEVER_LOADED = ("safety_checker", "feature_extractor")
"""Parts that no family uses."""
_WITHOUT_WEIGHTS = re.compile(r"(Scheduler|Tokenizer|TokenizerFast|Processor|Extractor)$")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_OTHERS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")
_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors library accepts."""
_MOST_FILES = 1000


class ModelFile(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True)

    path: str
    """Relative to the checkpoint, with slashes."""
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("path")
    @classmethod
    def _needed(cls, path: str) -> str:
        if not is_needed(path):
            raise ValueError(f"{path!r} is no file that a checkpoint is made of")
        return path


class Manifest(BaseModel):
    """A checkpoint in the object store: its files, their hashes, and its origin."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(max_length=2000)
    version: str
    """SHA-256 over the names and hashes of its files."""
    family: str = Field(max_length=200)
    """`_class_name` of its model_index.json."""
    files: tuple[ModelFile, ...] = Field(max_length=_MOST_FILES)
    pushed_at: datetime
    pushed_by: str = Field(max_length=200)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        paths = [file.path for file in self.files]
        if INDEX not in paths or len(set(paths)) < len(paths):
            raise ValueError(f"it names no {INDEX}, or a file twice")
        if self.version != version(self.hashes):
            raise ValueError("its version is not that of its files")
        return self

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def hashes(self) -> Mapping[str, str]:
        """The SHA-256 of each file by path."""
        return {file.path: file.sha256 for file in self.files}


def parse_manifest(data: bytes | str, where: str) -> Manifest:
    """A manifest from its JSON; raises `ModelError` for invalid JSON or an unsafe name."""
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ModelError(f"{where} is no manifest of a model: {place and place + ': '}{first['msg']}") from None


def version(hashes: Mapping[str, str]) -> str:
    """SHA-256 over the names and hashes of files; over all files of a family it is the model hash."""
    digest = hashlib.sha256()
    for path in sorted(hashes, key=lambda path: path.split("/")):
        digest.update(f"{path} {hashes[path]}\n".encode())
    return digest.hexdigest()


def is_needed(path: str) -> bool:
    """Whether a path belongs to a checkpoint: `model_index.json`, and configs and weights of its parts.

    Rejects every other name: paths outside the folder, control characters, pickles, programs.
    """
    if path == INDEX:
        return True
    part, slash, name = path.partition("/")
    if not slash or not _NAME.fullmatch(part) or not _NAME.fullmatch(name):
        return False
    return part not in _NEVER_LOADED and _matches(name, (*CONFIGS, *WEIGHTS))


def needed_files(folder: Path) -> list[str]:
    """The relative paths of a checkpoint's files in a folder.

    Raises `ModelError`, which names the missing or forbidden files, for a folder that no worker could open,
    regardless of its families.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder")
    index = read_json(folder / INDEX)
    if not isinstance(index.get("_class_name"), str):
        raise ModelError(f"{folder / INDEX} names no _class_name")
    parts = {part: entry for part, entry in index.items() if isinstance(entry, list) and entry != [None, None]}
    found = [INDEX]
    for part, entry in sorted(parts.items()):
        if part in _NEVER_LOADED or len(entry) != 2 or not all(isinstance(word, str) for word in entry):
            continue  # a flag or sizes, not a part
        found += _part_files(folder, part, *entry)
    if len(found) == 1:
        raise ModelError(f"{folder / INDEX} names no parts")
    for path in found:
        _refuse_strange(folder, folder / path)
    return found


def _part_files(folder: Path, part: str, library: str, kind: str) -> list[str]:
    where = folder / part
    if not _NAME.fullmatch(part):
        raise ModelError(f"{folder / INDEX} names a part {part!r}, which is no name of a folder")
    if library not in LIBRARIES:
        raise ModelError(f"{where}: needs code of its own ({library}), which the farm never runs")
    if not where.is_dir():
        raise ModelError(f"{where}: the checkpoint's {part} is missing")
    names = sorted(file.name for file in where.iterdir() if file.is_file() and not file.name.startswith("."))
    weights = [name for name in names if _matches(name, WEIGHTS)]
    if not _WITHOUT_WEIGHTS.search(kind):
        if "auto_map" in read_json(where / "config.json"):
            raise ModelError(f"{where}: needs code of its own (auto_map in its config.json), which the farm never runs")
        if not weights:
            raise ModelError(no_weights(where))
        for name in weights:
            _check_safetensors(where / name)
        check_shards(where, weights)
    paths = [f"{part}/{name}" for name in names if name in weights or _matches(name, CONFIGS)]
    strange = next((path for path in paths if not is_needed(path)), None)
    if strange is not None:
        raise ModelError(f"{folder} holds {strange!r}: such a name can't be sent")
    return paths


def no_weights(folder: Path) -> str:
    """The message for a part without weights that the farm can load."""
    others = sorted(file.name for file in folder.iterdir() if file.suffix in _OTHERS)
    found = f"only {', '.join(others)}" if others else "no weights at all"
    return f"{folder}: needs {WEIGHTS[0]} or {WEIGHTS[2]}, but there is {found}"


def check_shards(folder: Path, there: Sequence[str]) -> None:
    """Raise `ModelError` if an index names a shard that is not among the weights.

    The libraries load every file that an index names, even pickles, and transformers even files outside the folder.
    """
    for name in SHARD_INDEXES:
        if not (folder / name).exists():
            continue
        shards = read_json(folder / name).get("weight_map")
        if not isinstance(shards, dict):
            raise ModelError(f"{folder / name} has no weight_map")
        strange = next((shard for shard in shards.values() if shard not in there), None)
        if strange is not None:
            raise ModelError(f"{folder / name} names {strange!r}, which is no safetensors file of this part")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `ModelError`."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"can't read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds no JSON object")
    return values


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_strange(folder: Path, path: Path) -> None:
    """Raise `ModelError` for a link out of the folder, except into the blobs of the hub's cache."""
    real, root = path.resolve(), folder.resolve()
    if not (real.is_relative_to(root) or real.is_relative_to(root.parent.parent / "blobs")):
        raise ModelError(f"{path} is a link that leads out of the checkpoint, to {real}")


def _check_safetensors(path: Path) -> None:
    """Raise `ModelError` unless header and length match: partial downloads and Git LFS pointers fail this check."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 2 <= length <= min(size - 8, _HEADER_BYTES) else b""
    try:
        tensors = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
        raise ModelError(f"{path} is no safetensors file (a Git LFS pointer?)") from None
    if whole != size:
        raise ModelError(f"{path} has {size:,} bytes, and would have {whole:,} if it were whole")

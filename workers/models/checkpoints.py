"""Checks a checkpoint, local or from the hub: safetensors only, and no code from it ever runs."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from farm.errors import ModelError, ModelUnavailable
from farm.objects.model_files import (
    CONFIGS,
    INDEX,
    LIBRARIES,
    MANIFEST,
    WEIGHTS,
    check_shards,
    no_weights,
    parse_manifest,
    read_json,
    version,
)


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint that the farm can render."""

    name: str
    """`_class_name` of its model_index.json."""
    parts: tuple[str, ...] = ()
    """The parts that it loads."""
    optional: tuple[str, ...] = ()
    """Parts that a checkpoint may leave out (null in its model_index.json)."""


_WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")
# The allowed classes of parts. The libraries' `Auto…` and `…Pipeline` classes can run code from the folder of the
# weights.
_CLASS = re.compile(
    r"(?!Auto(?!encoder)|\w*Pipeline)(\w+(Scheduler|Tokenizer|TokenizerFast|Model|WithProjection)|Autoencoder\w+)"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TEMPORARY = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
"""Client errors of the hub that are temporary."""


@dataclass(frozen=True)
class Checkpoint:
    """A checked model: it has all parts that its family needs, as safetensors."""

    source: str
    path: Path
    """The local folder with model_index.json; unused for `null:`."""
    family: str
    """`_class_name` of its model_index.json."""
    sha256: str
    """The hash of the names and hashes of the files that its family loads: safetensors, configs, tokenizers."""
    parts: tuple[str, ...] = ()
    """The parts of its family that it has."""
    nbytes: int = 0
    """The size of its weights on disk."""


def open_checkpoint(source: str, families: Mapping[str, Family], *, weights: bool = True) -> Checkpoint:
    """Check a local folder, or download a hub id (`org/name`) and check it.

    Reads all weights once, for the hash; without `weights` it downloads, checks and hashes configs only. Raises
    `ModelError` with the name of a missing or invalid part, and `ModelUnavailable` while the hub does not answer.
    """
    if source.startswith("null:"):
        return Checkpoint(source, Path(), "NullPipeline", hashlib.sha256(source.encode()).hexdigest())
    path = Path(source).expanduser()
    if not path.is_dir():
        if not _HUB_ID.fullmatch(source):
            raise ModelError(f"no folder {source!r}, and it is no hub id (org/name) either")
        path = _download(source, families, (*CONFIGS, *WEIGHTS) if weights else CONFIGS)
    index = read_json(path / INDEX)
    name = index.get("_class_name")
    family = families.get(name) if isinstance(name, str) else None
    if name is None or family is None or not family.parts:
        known = ", ".join(known for known, family in families.items() if family.parts)
        raise ModelError(f"{path}: can't render a {name!r}; known are {known}")
    left_out = [part for part in family.optional if index.get(part) in (None, [None, None])]
    there = [part for part in family.parts if part not in left_out]
    weighty = [part for part in there if _check_part(path, part, index.get(part))]
    found = [file for part in weighty if weights for file in _weights(path / part)]
    configs = [file for part in there for kind in CONFIGS for file in (path / part).glob(kind)]
    return Checkpoint(
        source,
        path,
        name,
        sha256=_hash(path, [path / INDEX, *configs, *found]),
        parts=tuple(there),
        nbytes=sum(file.stat().st_size for file in found),
    )


def _download(source: str, families: Mapping[str, Family], files: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str]) -> Path:
        try:
            return Path(snapshot_download(source, allow_patterns=patterns))
        except Exception as error:
            kind = ModelError if _hub_refuses(error) else ModelUnavailable
            raise kind(f"can't download {source!r} from the hub: {error}") from error

    index = read_json(fetch([INDEX]) / INDEX)
    family = families.get(str(index.get("_class_name")), Family(""))
    return fetch([INDEX, *(f"{part}/{file}" for part in family.parts for file in files)])


def _hub_refuses(error: Exception) -> bool:
    """Whether the hub refuses a model permanently, rather than being unreachable."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # If the hub is unreachable, the library reports that its cache is empty: the cause is the original error.
    why = error.__cause__ or error if isinstance(error, LocalEntryNotFoundError) else error
    if isinstance(why, HfHubHTTPError):
        status = why.response.status_code
        return HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in _TEMPORARY
    return isinstance(why, ValueError | EntryNotFoundError | OfflineModeIsEnabled)


def _check_part(path: Path, part: str, entry: Any) -> bool:
    """Check that a part exists and needs only code of the libraries; returns whether it has weights."""
    folder = path / part
    if not isinstance(entry, list) or len(entry) != 2 or None in entry:
        raise ModelError(f"{path}/model_index.json names no {part}")
    if entry[0] not in LIBRARIES:
        raise ModelError(f"{folder}: needs code of its own ({entry[0]}), which the farm never runs")
    if not _CLASS.fullmatch(str(entry[1])):
        raise ModelError(f"{folder}: can't load a {entry[1]!r} as {part}")
    if not folder.is_dir():
        raise ModelError(f"{folder}: the checkpoint's {part} is missing")
    if part in _WITHOUT_WEIGHTS:
        return False
    config = read_json(folder / "config.json")
    if "auto_map" in config:
        raise ModelError(f"{folder}: needs code of its own (auto_map in its config.json), which the farm never runs")
    if "transformers_weights" in config or (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder}: takes its weights from elsewhere (an adapter); merge it into the model first")
    return True


def _weights(folder: Path) -> list[Path]:
    weights = sorted(file for name in WEIGHTS for file in folder.glob(name))
    if not weights:
        raise ModelError(no_weights(folder))
    check_shards(folder, [file.name for file in weights])
    return weights


def _hash(path: Path, files: list[Path]) -> str:
    hashes = {}
    for file in sorted(set(files)):
        with file.open("rb") as stream:
            hashes[file.relative_to(path).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    if (path / MANIFEST).exists():
        _compare(path, hashes)
    return version(hashes)


def _compare(path: Path, hashes: Mapping[str, str]) -> None:
    """Raise `ModelError` for a damaged or changed file, which differs from the manifest beside it."""
    expected = parse_manifest((path / MANIFEST).read_bytes(), str(path / MANIFEST)).hashes
    other = next((file for file, found in hashes.items() if expected.get(file) != found), None)
    if other is not None:
        raise ModelError(f"{path / other} is not what {MANIFEST} says it is: its SHA-256 differs")

"""Checkpoints in the farm's own object store: pushed atomically, with the hash of every file, by name and version.

`models/{name}/{version}/…` contains a checkpoint's files and its manifest; `models/{name}/farm-model.json` is the
manifest of the current version. It is written last, so that a push is visible whole or not at all. No batch's keys
begin with this prefix, because batch ids end in a hyphen and eight characters.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

from farm.errors import ModelError, NotFound, StorageUnavailable
from farm.objects.large_objects import Outgoing, Report, abort_uploads, upload_files
from farm.objects.model_files import (
    INDEX,
    MANIFEST,
    Manifest,
    ModelFile,
    needed_files,
    parse_manifest,
    read_json,
    version,
)
from farm.objects.storage import Storage

Bars: TypeAlias = Callable[[str, int], AbstractContextManager[Report]]
"""Creates a progress bar from a description and a number of bytes."""

PREFIX = "models/"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_REFERENCE = re.compile(rf"({_NAME.pattern})(?:@([0-9a-f]{{6,64}}))?")
_VERSION = re.compile(r"[0-9a-f]{64}")
_CHUNK = 2**20
_MANIFEST_BYTES = 2**20
"""The longest manifest that is read."""


@dataclass(frozen=True)
class Stored:
    """A model in the store."""

    manifest: Manifest
    older: int
    """The number of older versions."""


@dataclass(frozen=True)
class Pushed:
    """The result of a push."""

    manifest: Manifest
    sent_bytes: int
    """The bytes that were not in the store before."""
    new: bool
    """Whether the current version changed."""


class ModelStore:
    """The models in a farm's bucket. All methods raise `StorageUnavailable` if it does not answer."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def push(self, folder: Path, name: str, owner: str, bar: Bars = lambda *_: nullcontext(lambda _: None)) -> Pushed:
        """Upload a checkpoint under a name; it becomes visible when it is complete.

        Files that were sent before are not sent again. A `bar` is created for hashing and another for sending. Raises
        `ModelError` for a folder that is no checkpoint, before sending, and `StorageUnavailable` if another
        push of that name finished meanwhile.
        """
        check_name(name)
        folder = folder.expanduser()
        paths = needed_files(folder)
        before = {path: (folder / path).stat() for path in paths}
        total = sum(stat.st_size for stat in before.values())
        key = f"{PREFIX}{name}/{MANIFEST}"
        current, etag = self._current(name)
        with bar(f"hashing {name}", total) as report:
            hashes = {path: _hash(folder / path, report) for path in paths}
        manifest = Manifest(
            name=name,
            version=version(hashes),
            family=str(read_json(folder / INDEX)["_class_name"]),
            files=tuple(ModelFile(path=path, bytes=before[path].st_size, sha256=hashes[path]) for path in paths),
            pushed_at=datetime.now(UTC).replace(microsecond=0),
            pushed_by=owner,
        )
        place = f"{PREFIX}{name}/{manifest.version}"
        files = [
            Outgoing(folder / file.path, f"{place}/{file.path}", file.bytes, file.sha256) for file in manifest.files
        ]
        with bar(f"sending {name}", total) as report:
            sent = upload_files(self._storage, files, report)
        for path, stat in before.items():
            after = (folder / path).stat()
            if (after.st_size, after.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
                raise ModelError(f"{folder / path} was written to while it was pushed: push again")
        if current is not None and current.version == manifest.version:
            return Pushed(current, sent, new=False)
        data = manifest.model_dump_json(indent=2).encode()
        self._storage.put(f"{place}/{MANIFEST}", data, "application/json")
        if not self._storage.put_if(key, data, etag, "application/json"):
            there, _ = self._current(name)
            if there is not None and there.version == manifest.version:
                return Pushed(there, sent, new=False)
            raise StorageUnavailable(f"another client pushed {name} at the same time: push again to use yours")
        return Pushed(manifest, sent, new=True)

    def find(self, reference: str) -> Manifest:
        """The manifest of a `name`'s current version, or of `name@version`; six digits of a version are enough.

        Raises `NotFound`, and `ModelError` for an invalid manifest.
        """
        name, asked = parse_reference(reference)
        current, _ = self._current(name)
        if current is None:
            raise NotFound(f"no model {name!r} was pushed to this farm: farm models push DIR {name}")
        if current.version.startswith(asked):
            return current
        found = [one for one in self._versions(name) if one.startswith(asked)]
        if len(found) != 1:
            what = "several versions that begin" if found else "no version that begins"
            raise NotFound(f"model {name!r} has {what} with {asked}; the current one is {current.version[:12]}")
        manifest, _ = self._manifest(name, f"{PREFIX}{name}/{found[0]}/{MANIFEST}")
        if manifest.version != found[0]:
            raise ModelError(f"what lies at {PREFIX}{name}/{found[0]}/ is another version, {manifest.version}")
        return manifest

    def models(self) -> Iterator[Stored]:
        """The pushed models, by name, without incomplete ones."""
        with self._storage.client(PREFIX) as s3:
            pages = s3.get_paginator("list_objects_v2").paginate(
                Bucket=self._storage.bucket, Prefix=PREFIX, Delimiter="/"
            )
            names = [
                found["Prefix"].removeprefix(PREFIX)[:-1] for page in pages for found in page.get("CommonPrefixes", ())
            ]
        for name in sorted(filter(_NAME.fullmatch, names)):
            current, _ = self._current(name)
            if current is not None:
                yield Stored(current, sum(one != current.version for one in self._versions(name)))

    def delete(self, reference: str) -> Manifest:
        """Delete a model with all its versions, or only `name@version`; returns its manifest.

        Workers that hold the model keep it. Raises `NotFound`, and `ModelError` for the current version alone.
        """
        name, asked = parse_reference(reference)
        manifest = self.find(reference)
        prefix = f"{PREFIX}{name}/"
        if asked:
            current, _ = self._current(name)
            if current is not None and current.version == manifest.version:
                raise ModelError(f"{reference} is the current version: delete {name} as a whole, or push another first")
            prefix += f"{manifest.version}/"
        # The manifest first, so that no worker starts to fetch it.
        self._storage.delete(f"{prefix}{MANIFEST}")
        self._storage.delete_many(self._storage.keys(prefix))
        abort_uploads(self._storage, prefix)
        return manifest

    def _current(self, name: str) -> tuple[Manifest | None, str | None]:
        """The manifest of a model's current version and its ETag."""
        try:
            return self._manifest(name, f"{PREFIX}{name}/{MANIFEST}")
        except NotFound:
            return None, None

    def _manifest(self, name: str, key: str) -> tuple[Manifest, str]:
        manifest, etag = _read(self._storage, self._storage.bucket, key)
        if manifest.name != name:
            raise ModelError(f"{key} is the manifest of another model, {manifest.name!r}")
        return manifest, etag

    def _versions(self, name: str) -> list[str]:
        """The complete versions of a model."""
        with self._storage.client(PREFIX) as s3:
            pages = s3.get_paginator("list_objects_v2").paginate(
                Bucket=self._storage.bucket, Prefix=f"{PREFIX}{name}/", Delimiter="/"
            )
            found = [each["Prefix"].split("/")[-2] for page in pages for each in page.get("CommonPrefixes", ())]
        return [one for one in found if _VERSION.fullmatch(one) and self._is_whole(name, one)]

    def _is_whole(self, name: str, one: str) -> bool:
        return any(True for _ in self._storage.keys(f"{PREFIX}{name}/{one}/{MANIFEST}"))


def check_name(name: str) -> None:
    """Raise `ModelError` unless a name is valid in keys, URLs and sources."""
    if not _NAME.fullmatch(name):
        raise ModelError(f"a pushed model can't be called {name!r}: letters, digits, '.', '_' and '-', at most 100")


def parse_reference(reference: str) -> tuple[str, str]:
    """The name and the version (or "") of `name` or `name@version`; raises `ModelError`."""
    found = _REFERENCE.fullmatch(reference)
    if not found:
        raise ModelError(f"{reference!r} is no name of a pushed model, nor name@version (six to 64 hexadecimal digits)")
    return found[1], found[2] or ""


def read_manifest(storage: Storage, bucket: str, key: str) -> Manifest:
    """A validated manifest from any bucket; raises `NotFound`, and `ModelError` for an invalid one."""
    return _read(storage, bucket, key)[0]


def _read(storage: Storage, bucket: str, key: str) -> tuple[Manifest, str]:
    where = f"s3://{bucket}/{key}"
    with storage.client(where) as s3:
        found = s3.get_object(Bucket=bucket, Key=key)
        data = found["Body"].read(_MANIFEST_BYTES + 1)
    if len(data) > _MANIFEST_BYTES:
        raise ModelError(f"{where} is no manifest of a model: it is too long")
    return parse_manifest(data, where), found["ETag"]


def _hash(path: Path, report: Report) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while data := stream.read(_CHUNK):
            digest.update(data)
            report(len(data))
    return digest.hexdigest()

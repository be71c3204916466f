"""Models in an object store: the files of a source such as `farm:sd15` or `s3://bucket/prefix`."""

import hashlib
from dataclasses import dataclass

from farm.errors import NotFound
from farm.objects.model_files import INDEX, MANIFEST, Manifest, is_needed
from farm.objects.model_store import PREFIX, ModelStore, read_manifest
from farm.objects.storage import Storage

FARM = "farm:"
"""The prefix of the source of a model that was pushed to the farm: `farm:name` or `farm:name@version`."""
S3 = "s3://"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a model, with its size and the identity of its content."""

    path: str
    """Relative to the model, with slashes."""
    bytes: int
    sha256: str | None
    """None without a manifest."""
    etag: str | None = None
    """The ETag of the listed object, if there is no hash."""


@dataclass(frozen=True)
class RemoteModel:
    """One version of a model."""

    source: str
    version: str
    """64 hexadecimal digits, different for different content."""
    bucket: str
    prefix: str
    """The prefix of the keys of its files."""
    files: tuple[RemoteFile, ...]

    @property
    def bytes(self) -> int:
        """The total size of its files."""
        return sum(file.bytes for file in self.files)


def is_remote(source: str) -> bool:
    """Whether a model's source is in an object store."""
    return source.startswith((FARM, S3))


def find_remote(storage: Storage, source: str) -> RemoteModel:
    """The current version of the model at a source.

    With a manifest its files have hashes; otherwise they are listed from the prefix. Raises
    `NotFound`, `StorageUnavailable`, and `ModelError` for an invalid name or manifest.
    """
    if source.startswith(FARM):
        manifest = ModelStore(storage).find(source.removeprefix(FARM))
        return _of(source, manifest, storage.bucket, f"{PREFIX}{manifest.name}/{manifest.version}/")
    bucket, _, rest = source.removeprefix(S3).partition("/")
    prefix = f"{rest.strip('/')}/" if rest.strip("/") else ""
    try:
        manifest = read_manifest(storage, bucket, f"{prefix}{MANIFEST}")
    except NotFound:
        return _listed(storage, source, bucket, prefix)
    try:
        with storage.client(source) as s3:
            s3.head_object(Bucket=bucket, Key=f"{prefix}{INDEX}")
    except NotFound:
        prefix += f"{manifest.version}/"  # in the farm's store the current manifest lies beside the versions
    return _of(source, manifest, bucket, prefix)


def _of(source: str, manifest: Manifest, bucket: str, prefix: str) -> RemoteModel:
    files = tuple(RemoteFile(file.path, file.bytes, file.sha256) for file in manifest.files)
    return RemoteModel(source, manifest.version, bucket, prefix, files)


def _listed(storage: Storage, source: str, bucket: str, prefix: str) -> RemoteModel:
    """The model under a prefix: only the files of a checkpoint, and none outside its folder."""
    files = []
    with storage.client(source) as s3:
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for found in page.get("Contents", ()):
                path = found["Key"].removeprefix(prefix)
                if is_needed(path):
                    files.append(RemoteFile(path, found["Size"], None, found.get("ETag")))
    if not files:
        raise NotFound(f"there is nothing under {S3}{bucket}/{prefix} that a checkpoint is made of")
    if all(file.path != INDEX for file in files):
        raise NotFound(f"{S3}{bucket}/{prefix} has no {INDEX}")
    digest = hashlib.sha256(f"{S3}{bucket}/{prefix}\n".encode())
    for file in files:
        digest.update(f"{file.path} {file.bytes} {file.etag}\n".encode())
    return RemoteModel(source, digest.hexdigest(), bucket, prefix, tuple(files))

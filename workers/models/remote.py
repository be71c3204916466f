"""Models in an object store: what a source such as `farm:sd15` or `s3://bucket/prefix` names, file by file."""

import hashlib
from dataclasses import dataclass

from farm.errors import NotFound
from farm.objects.model_files import INDEX, MANIFEST, Manifest, is_needed
from farm.objects.model_store import PREFIX, ModelStore, read_manifest
from farm.objects.storage import Storage

FARM = "farm:"
"""How the source of a model begins that was pushed to the farm: `farm:name`, or `farm:name@version`."""
S3 = "s3://"


@dataclass(frozen=True)
class RemoteFile:
    """One file of a model, as it must come."""

    path: str
    """Relative to the model, with slashes."""
    bytes: int
    sha256: str | None
    """None where nobody has said."""
    etag: str | None = None
    """Of the object that was listed, where no hash says what is right."""


@dataclass(frozen=True)
class RemoteModel:
    """One version of a model."""

    source: str
    version: str
    """64 hexadecimal digits: other content, another version."""
    bucket: str
    prefix: str
    """What the keys of its files begin with."""
    files: tuple[RemoteFile, ...]

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(file.bytes for file in self.files)


def is_remote(source: str) -> bool:
    """Whether a model's source is in an object store."""
    return source.startswith((FARM, S3))


def find_remote(storage: Storage, source: str) -> RemoteModel:
    """What a source names now.

    With a manifest its hashes say what is right, wherever it lies; a mere prefix is as it is listed. Raises `NotFound`,
    `StorageUnavailable`, and `ModelError` for a name or a manifest that is none.
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
        with storage.reaching(source) as s3:
            s3.head_object(Bucket=bucket, Key=f"{prefix}{INDEX}")
    except NotFound:
        prefix += f"{manifest.version}/"  # where models are pushed to, the current one's manifest lies beside them
    return _of(source, manifest, bucket, prefix)


def _of(source: str, manifest: Manifest, bucket: str, prefix: str) -> RemoteModel:
    files = tuple(RemoteFile(file.path, file.bytes, file.sha256) for file in manifest.files)
    return RemoteModel(source, manifest.version, bucket, prefix, files)


def _listed(storage: Storage, source: str, bucket: str, prefix: str) -> RemoteModel:
    """What lies under a prefix; of all that, only what checkpoints are made of, and nothing that leaves its folder."""
    files = []
    with storage.reaching(source) as s3:
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

"""Downloads a model's files into a folder: pieces in parallel, hashed on arrival, resumed if interrupted.

boto3's downloads (s3transfer) cannot resume, and write pieces out of order, which prevents hashing on arrival.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

from farm.errors import ModelError, ModelUnavailable
from farm.objects.large_objects import Report, read_range
from farm.objects.storage import Storage
from farm.runtime.parallel import parallel_map
from farm.runtime.retrying import insist
from workers.models.remote import RemoteFile, RemoteModel

Piece: TypeAlias = tuple[RemoteFile, int, int]
"""A file, the position of a first byte in it, and a number of bytes."""

_PIECE_BYTES = 8 * 2**20
_CHUNK = 2**20
_OUTAGE_SECONDS = 10.0
"""How long a piece is asked for again while the object store is away."""


def fetch(
    storage: Storage,
    remote: RemoteModel,
    files: Sequence[RemoteFile],
    folder: Path,
    report: Report = lambda _: None,
    stopping: threading.Event | None = None,
) -> dict[str, str]:
    """Download files of a model into a folder, each synced to the disk; returns their SHA-256, by path.

    A file whose hash is known is resumed where an interrupted download stopped; `report` counts those bytes too. Raises
    `ModelError` with the name of an object that differs from what was pushed, `StorageUnavailable` if the store did not
    answer for some seconds, `ModelUnavailable` once `stopping` is set, and `OSError` when the disk is full.
    """
    stopping = stopping or threading.Event()
    found: dict[str, str] = {}
    left = list(files)
    while left:
        begun = {file.path: _resume(folder / file.path, file) for file in left}
        report(sum(have for have, _ in begun.values()))
        pieces = [
            (file, start, min(_PIECE_BYTES, file.bytes - start))
            for file in left
            for start in range(begun[file.path][0], file.bytes, _PIECE_BYTES)
        ]
        again = []
        with closing(parallel_map(_getter(storage, remote, stopping), pieces)) as coming:
            for file in left:
                have, digest = begun[file.path]
                _receive(folder / file.path, file, have, digest, coming, report)
                if file.sha256 in (None, digest.hexdigest()):
                    found[file.path] = digest.hexdigest()
                    continue
                (folder / file.path).unlink()
                if not have:
                    where = f"s3://{remote.bucket}/{remote.prefix}{file.path}"
                    raise ModelError(f"{where} is not what was pushed: its SHA-256 differs")
                again.append(file)  # the resumed part may be from another file
                report(-file.bytes)
        left = again
    return found


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _resume(path: Path, file: RemoteFile) -> tuple[int, "hashlib._Hash"]:
    """The number of bytes that are on disk already, and their running SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    have = 0
    # Bytes that a crash left can be trusted only if the final hash is known.
    if path.is_file() and file.sha256 is not None and path.stat().st_size <= file.bytes:
        with path.open("rb") as stream:
            while data := stream.read(_CHUNK):
                digest.update(data)
                have += len(data)
        if have < file.bytes or digest.hexdigest() == file.sha256:
            return have, digest
    path.unlink(missing_ok=True)
    return 0, hashlib.sha256()


def _receive(
    path: Path, file: RemoteFile, have: int, digest: "hashlib._Hash", coming: Iterator[bytes], report: Report
) -> None:
    with path.open("ab") as out:
        while have < file.bytes:
            data = next(coming)
            out.write(data)
            digest.update(data)
            have += len(data)
            report(len(data))
        out.flush()
        os.fsync(out.fileno())


def _getter(storage: Storage, remote: RemoteModel, stopping: threading.Event) -> Callable[[Piece], bytes]:
    def get(piece: Piece) -> bytes:
        file, start, length = piece

        def read_piece() -> bytes:
            if stopping.is_set():
                raise ModelUnavailable(f"this worker stops, and fetches no more of {remote.source}")
            return read_range(storage, remote.bucket, f"{remote.prefix}{file.path}", start, length, file.etag)

        return insist(read_piece, _OUTAGE_SECONDS, stopping)

    return get

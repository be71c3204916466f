"""The files of a model brought into a folder: many pieces at once, hashed as they come, on from where it broke off."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

from farm.errors import ModelError, ModelUnavailable
from farm.objects.large_objects import Report, read
from farm.objects.storage import Storage
from farm.runtime.parallel import parallel_map
from farm.runtime.retrying import insist
from workers.models.remote import RemoteFile, RemoteModel

Piece: TypeAlias = tuple[RemoteFile, int, int]
"""A file, and the first and number of its bytes."""

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
    """Bring files of a model into a folder, each written through to the disk; returns their SHA-256, by path.

    What an interrupted fetch has left there is hashed and gone on with, where the file's hash is known. `report` is
    told of that too. Raises `ModelError`, naming it, for an object that is not what was pushed; `StorageUnavailable`
    once the store was away for some seconds; `ModelUnavailable` when told to stop; `OSError` when the disk is full.
    """
    stopping = stopping or threading.Event()
    found: dict[str, str] = {}
    left = list(files)
    while left:
        begun = {file.path: _take_up(folder / file.path, file) for file in left}
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
                again.append(file)  # what lay here may be what is wrong
                report(-file.bytes)
        left = again
    return found


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _take_up(path: Path, file: RemoteFile) -> tuple[int, "hashlib._Hash"]:
    """How many of a file's bytes are here already, and what they hash to so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    have = 0
    # Without its hash nobody could tell whether what a crash has left is right.
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
            return read(storage, remote.bucket, f"{remote.prefix}{file.path}", start, length, file.etag)

        return insist(read_piece, _OUTAGE_SECONDS, stopping)

    return get

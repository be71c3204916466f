"""The disk cache of models from the object store: shared by a machine's workers, checked, limited in size.

A version is a folder, which appears under its name only when complete. Each has two kernel file locks, released when
their process ends: `fetching` is exclusive, for the worker that fetches or repairs the version; `used` is shared by the
workers that have it loaded. Deleting it takes both exclusively. A third lock, `room`, serialises the workers that make
room for different versions.
"""

import errno
import fcntl
import logging
import os
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TypeVar

from farm.errors import FarmError, ModelError, ModelUnavailable
from farm.objects.model_files import INDEX, MANIFEST, Manifest, ModelFile, parse_manifest, read_json, version
from farm.objects.storage import Storage
from farm.runtime.atomic_files import sync
from farm.runtime.transfer_progress import transfer
from workers.models.fetching import fetch, sha256_of
from workers.models.remote import RemoteFile, RemoteModel, find_remote, is_remote

log = logging.getLogger(__name__)

T = TypeVar("T")

_VERSION = re.compile(r"([0-9a-f]{64})(\.part)?")
_WEIGHTS = ".safetensors"
_POLL_SECONDS = 0.1
_REPORT_SECONDS = 10.0
_ABANDONED_SECONDS = 24 * 3600.0
"""The age at which an interrupted fetch is deleted."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_GB = 1e9


@dataclass
class _Kept:
    """A version on this disk, complete or not."""

    version: str
    bytes: int = 0
    """Its size, or the size that it will have when it is fetched."""
    whole: bool = False
    used_at: float = 0.0


class ModelCache:
    """A folder shared by all workers of a machine. All methods may be called from any thread and process."""

    def __init__(
        self, folder: Path, storage: Storage, most_bytes: int | None = None, stopping: threading.Event | None = None
    ) -> None:
        """Keep at most `most_bytes` of models in a folder; `stopping` aborts a fetch."""
        self._folder = folder.expanduser()
        self._storage = storage
        self._most = most_bytes
        self._stopping = stopping or threading.Event()
        self._remotes: dict[str, RemoteModel] = {}

    def load(self, source: str, load: Callable[[str], T]) -> T:
        """Call `load` with a source, or with its folder in the cache if it is in the object store.

        The folder is not deleted as long as the result exists. A damaged folder is repaired, and loaded again. Raises
        what `load` raises, `ModelUnavailable` while the object store does not answer or the disk is full, and
        `ModelError` for a model that can't be fetched.
        """
        if not is_remote(source):
            return load(source)
        used, folder = self._open(source)
        try:
            try:
                model = load(str(folder))
            except ModelError:
                if not self._discard_damaged(folder):
                    raise
                log.warning("%s is damaged in %s: fetching the damaged files again", source, folder)
                used.close()
                used, folder = self._open(source)
                model = load(str(folder))
        except BaseException:
            used.close()
            raise
        weakref.finalize(model, _release, used)
        return model

    def load_configs(self, source: str, load: Callable[[str], T]) -> T:
        """Call `load` with a source, or with a temporary folder of its configs if it is in the object store.

        Raises what `load` raises, `ModelError`, `NotFound` and `StorageUnavailable`.
        """
        if not is_remote(source):
            return load(source)
        remote = self._remote(source)
        configs = [file for file in remote.files if not file.path.endswith(_WEIGHTS)]
        with TemporaryDirectory() as folder:
            fetch(self._storage, remote, configs, Path(folder), stopping=self._stopping)
            return load(folder)

    def weights_bytes(self, source: str) -> int:
        """The size of the weights of a model in the object store; 0 if it does not answer."""
        try:
            files = self._remote(source).files
        except FarmError:
            return 0
        return sum(file.bytes for file in files if file.path.endswith(_WEIGHTS))

    def _remote(self, source: str) -> RemoteModel:
        # Queried once: a worker loads the version that it has announced, even if another is pushed meanwhile.
        if source not in self._remotes:
            self._remotes[source] = find_remote(self._storage, source)
        return self._remotes[source]

    def _open(self, source: str) -> tuple[IO[bytes], Path]:
        """Fetch a model unless it is cached; returns a lock that prevents its deletion until closed, and its folder."""
        try:
            remote = self._remote(source)
            used = self._lock(f"{remote.version}.used")
            try:
                _acquire(used, fcntl.LOCK_SH, self._check_stopping)
                self._ensure(remote)
                os.utime(used.fileno())
            except BaseException:
                used.close()
                raise
        except ModelError:
            raise
        except FarmError as error:
            kind = ModelUnavailable if error.retryable else ModelError
            raise kind(f"can't fetch {source}: {error}") from error
        except OSError as error:
            raise ModelError(f"can't keep {source} in the cache {self._folder}: {error}") from error
        return used, self._folder / remote.version

    def _ensure(self, remote: RemoteModel) -> None:
        with closing(self._lock(f"{remote.version}.fetching")) as fetching:
            if not _try(fetching, fcntl.LOCK_EX):
                log.info("another worker fetches %s: waiting for it", remote.source)
                _acquire(fetching, fcntl.LOCK_EX, self._progress_logger(remote))
            if missing := self._missing(remote):
                self._fetch(remote, missing, fetching)

    def _missing(self, remote: RemoteModel) -> list[RemoteFile]:
        """The files that are missing, or differ in size or from the manifest beside them."""
        folder = self._folder / remote.version
        hashes = _known(folder)
        return [
            file
            for file in remote.files
            if not (folder / file.path).is_file()
            or (folder / file.path).stat().st_size != file.bytes
            or file.path not in hashes
            or file.sha256 not in (None, hashes[file.path])
        ]

    def _fetch(self, remote: RemoteModel, missing: list[RemoteFile], fetching: IO[bytes]) -> None:
        folder, part = self._folder / remote.version, self._part(remote.version)
        total = sum(file.bytes for file in missing)
        self._make_room(remote, total, fetching)
        began = time.monotonic()
        log.info("fetching %s, version %s, %d MiB", remote.source, remote.version[:12], total >> 20)
        try:
            with transfer(f"fetching {remote.source}", total, log) as report:
                hashes = fetch(self._storage, remote, missing, part, report, self._stopping)
            if folder.is_dir():
                hashes = {**_known(folder), **hashes}
            (part / MANIFEST).write_text(_manifest(remote, hashes, part, folder).model_dump_json(indent=2))
            _settle(part, folder)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            shutil.rmtree(part, ignore_errors=True)
            raise ModelUnavailable(
                f"the disk of the cache {self._folder} is full: {remote.source} takes {remote.bytes / _GB:.1f} GB"
            ) from error
        log.info("fetched %s, %d files, in %.1f s", remote.source, len(missing), time.monotonic() - began)

    def _discard_damaged(self, folder: Path) -> bool:
        """Delete the files of a version that differ from its manifest; False if there are none."""
        with closing(self._lock(f"{folder.name}.fetching")) as fetching:
            _acquire(fetching, fcntl.LOCK_EX, self._check_stopping)
            expected = _known(folder)
            wrong = [
                folder / path
                for path, sha256 in expected.items()
                if not (folder / path).is_file() or sha256_of(folder / path) != sha256
            ]
            for path in wrong:
                path.unlink(missing_ok=True)
            return bool(wrong) or not expected

    # --- room -----------------------------------------------------------------------------------------------

    def _make_room(self, remote: RemoteModel, needed: int, fetching: IO[bytes]) -> None:
        """Reserve room for a version; deletes versions that are not in use, least recently used first, if necessary."""
        gb = f"{remote.source} takes {remote.bytes / _GB:.2f} GB"
        if self._most is not None and remote.bytes > self._most:
            raise ModelError(f"{gb}, more than the cache may hold ({self._most / _GB:.2f}, FARM_MODEL_CACHE_SIZE)")
        if remote.bytes > (disk := shutil.disk_usage(self._folder)).total:
            raise ModelError(f"{gb}, more than the disk of {self._folder} ({disk.total / _GB:.2f})")
        with closing(self._lock("room")) as room:
            _acquire(room, fcntl.LOCK_EX, self._check_stopping)
            part = self._part(remote.version)
            part.mkdir(exist_ok=True)
            here = _bytes_in(part)
            others = [kept for kept in self._kept() if kept.version != remote.version]
            old = time.time() - _ABANDONED_SECONDS
            others = [kept for kept in others if kept.whole or kept.used_at > old or not self._evict(kept)]
            others.sort(key=lambda kept: (kept.whole, kept.used_at))
            while True:
                excess = 0 if self._most is None else sum(kept.bytes for kept in others) + remote.bytes - self._most
                lacking = needed - here - shutil.disk_usage(self._folder).free
                if excess <= 0 and lacking <= 0:
                    break
                gone = next((kept for kept in others if self._evict(kept)), None)
                if gone is None:
                    if not here:
                        part.rmdir()
                    held = "everything else in it is in use" if others else "there is nothing else in it"
                    why = f"{excess / _GB:.2f} GB above its limit" if excess > 0 else f"{lacking / _GB:.2f} GB too few"
                    raise ModelUnavailable(f"{gb}, {why} in the cache {self._folder}, and {held}")
                others.remove(gone)
            # From here on other workers count this size.
            os.ftruncate(fetching.fileno(), 0)
            os.pwrite(fetching.fileno(), str(remote.bytes).encode(), 0)

    def _kept(self) -> list[_Kept]:
        found: dict[str, _Kept] = {}
        for path in self._folder.iterdir():
            if not (named := _VERSION.fullmatch(path.name)):
                continue
            kept = found.setdefault(named[1], _Kept(named[1]))
            kept.bytes += _bytes_in(path)
            kept.whole |= named[2] is None
            with suppress(OSError):
                kept.used_at = (self._locks / f"{named[1]}.used").stat().st_mtime
        for kept in found.values():
            if not kept.whole:
                with suppress(OSError, ValueError):
                    kept.bytes = max(kept.bytes, int((self._locks / f"{kept.version}.fetching").read_text()))
        return list(found.values())

    def _evict(self, kept: _Kept) -> bool:
        """Delete a version; False if a worker uses or fetches it."""
        with (
            closing(self._lock(f"{kept.version}.fetching")) as fetching,
            closing(self._lock(f"{kept.version}.used")) as used,
        ):
            if not (_try(fetching, fcntl.LOCK_EX) and _try(used, fcntl.LOCK_EX)):
                return False
            part, folder = self._part(kept.version), self._folder / kept.version
            shutil.rmtree(part, ignore_errors=True)
            if folder.is_dir():
                folder.rename(part)  # a half-deleted version must not look complete
                shutil.rmtree(part, ignore_errors=True)
        log.info("deleted version %s from the cache: %.2f GB unused", kept.version[:12], kept.bytes / _GB)
        return True

    # --- locks ----------------------------------------------------------------------------------------------

    @property
    def _locks(self) -> Path:
        return self._folder / "locks"

    def _lock(self, name: str) -> IO[bytes]:
        """The open file of a lock, not yet locked. It is never deleted, or two workers could hold the same lock."""
        self._locks.mkdir(parents=True, exist_ok=True)
        return (self._locks / name).open("a+b", buffering=0)

    def _part(self, version: str) -> Path:
        return self._folder / f"{version}.part"

    def _check_stopping(self) -> None:
        if self._stopping.is_set():
            raise ModelUnavailable("this worker stops, and waits for no model")

    def _progress_logger(self, remote: RemoteModel) -> Callable[[], None]:
        """A function that logs the progress of the fetching worker every ten seconds."""
        told = time.monotonic()

        def tell() -> None:
            nonlocal told
            self._check_stopping()
            if time.monotonic() - told > _REPORT_SECONDS:
                told = time.monotonic()
                done = _bytes_in(self._part(remote.version))
                log.info("another worker fetches %s: %d of %d MiB", remote.source, done >> 20, remote.bytes >> 20)

        return tell


def _try(lock: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _acquire(lock: IO[bytes], kind: int, meanwhile: Callable[[], None]) -> None:
    while not _try(lock, kind):
        meanwhile()
        time.sleep(_POLL_SECONDS)


def _release(used: IO[bytes]) -> None:
    with suppress(OSError):
        os.utime(used.fileno())  # the time of its last use
    used.close()


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # another worker may delete it meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def _known(folder: Path) -> dict[str, str]:
    """The hashes of a version's files from its manifest; empty if that is missing or damaged."""
    try:
        return dict(parse_manifest((folder / MANIFEST).read_bytes(), str(folder)).hashes)
    except (OSError, ModelError):
        return {}


def _manifest(remote: RemoteModel, hashes: dict[str, str], part: Path, folder: Path) -> Manifest:
    """The manifest of a fetched version, also of a source without one."""
    index = part / INDEX if (part / INDEX).exists() else folder / INDEX
    hashes = {file.path: hashes[file.path] for file in remote.files}
    return Manifest(
        name=remote.source,
        version=version(hashes),
        family=str(read_json(index).get("_class_name")),
        files=tuple(ModelFile(path=file.path, bytes=file.bytes, sha256=hashes[file.path]) for file in remote.files),
        pushed_at=datetime.now(UTC).replace(microsecond=0),
        pushed_by="",
    )


def _settle(part: Path, folder: Path) -> None:
    """Move fetched files into place and sync them: the whole folder, or file by file into a folder under repair."""
    files = [path for path in part.rglob("*") if path.is_file()]
    for path in (part / MANIFEST, *{path.parent for path in files}):
        sync(path)
    if not folder.exists():
        part.rename(folder)
    else:
        for path in sorted(files, key=lambda path: path.name == MANIFEST):  # the manifest last
            (folder / path.relative_to(part)).parent.mkdir(exist_ok=True)
            path.replace(folder / path.relative_to(part))
        shutil.rmtree(part)
    sync(folder.parent)

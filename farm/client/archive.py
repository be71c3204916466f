"""A batch's pictures in one ZIP file, with its manifest."""

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from farm.client import pictures
from farm.jobs.records import JobInfo
from farm.objects.storage import Storage
from farm.runtime.atomic_files import atomic_file
from farm.runtime.parallel import parallel_map

_MANIFEST = "manifest.jsonl"


def archive(
    storage: Storage, jobs: Iterable[JobInfo], manifest: Iterable[Mapping[str, Any]], path: Path
) -> Iterator[JobInfo]:
    """Write the pictures and films of succeeded jobs, then the manifest; yields each job after writing it.

    Pictures are stored without further compression. The file replaces `path` atomically when it is complete; after an
    error the previous file is unchanged. Each picture is checked against the SHA-256 in SQL.

    Raises `StorageUnavailable`.
    """
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:
        for job, files in parallel_map(lambda job: (job, pictures.fetch_files(storage, job)), jobs):
            for name, data in files:
                packed.writestr(_entry(name, job), data)
            yield job
        with packed.open(zipfile.ZipInfo(_MANIFEST), "w", force_zip64=True) as lines:
            lines.writelines(json.dumps(entry).encode() + b"\n" for entry in manifest)


def _entry(name: str, job: JobInfo) -> zipfile.ZipInfo:
    ended = job.finished_at
    entry = zipfile.ZipInfo(name, ended.timetuple()[:6] if ended is not None else (1980, 1, 1, 0, 0, 0))
    entry.external_attr = 0o644 << 16
    return entry

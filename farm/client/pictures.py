"""What a finished job left in the object store, fetched: its picture, and the pictures of its steps."""

import hashlib
import io
from pathlib import Path

from PIL import Image, ImageSequence

from farm.errors import JobNotSucceeded, NotFound, StorageUnavailable
from farm.jobs.records import Artifact, JobInfo, Picture, Role
from farm.objects.storage import Storage
from farm.runtime.atomic_files import write_atomic


def succeeded(job: JobInfo) -> Picture:
    """The picture of a job; raises `JobNotSucceeded` with the reason if it has none."""
    if job.picture is None:
        why = f": {job.error}" if job.error else ""
        raise JobNotSucceeded(f"job {job.id} has no picture, it is {job.state}{why}")
    return job.picture


def stored(storage: Storage, job: JobInfo, artifact: Artifact) -> bytes:
    """An artifact of a job, checked against its SHA-256 in SQL.

    Raises `StorageUnavailable` if what is stored is not what was rendered.
    """
    return _checked(storage, job, artifact.key, artifact.sha256)


def _checked(storage: Storage, job: JobInfo, key: str, sha256: str | None) -> bytes:
    data = storage.get(key)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise StorageUnavailable(f"job {job.id}: {key} is not what was rendered (its SHA-256 differs)")
    return data


def artifact(job: JobInfo, role: Role) -> Artifact:
    """The artifact of a job in a role; raises `JobNotSucceeded`, or `NotFound` if it has none."""
    succeeded(job)
    found = next((each for each in job.artifacts if each.role == role), None)
    if found is None:
        raise NotFound(f"job {job.id} kept no {role}")
    return found


def png(storage: Storage, job: JobInfo) -> bytes:
    """A job's picture as it is stored, checked against the SHA-256 in SQL.

    Raises `JobNotSucceeded`, or `StorageUnavailable` if what is stored is not what was rendered.
    """
    picture = succeeded(job)
    return _checked(storage, job, picture.key, picture.sha256)


def decoded(data: bytes) -> Image.Image:
    """An image from its file's bytes, read to its end."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def frames(data: bytes, steps: int) -> list[Image.Image]:
    """The RGB frames of an animation that has one of equal length for each step, in their order."""
    with Image.open(io.BytesIO(data)) as film:
        # Converted first: a WebP frame does not know how long it lasts before it is read.
        found = [(frame.convert("RGB"), frame.info.get("duration", 0)) for frame in ImageSequence.Iterator(film)]
    if len(found) < steps:
        # WebP writes equal neighbours as one frame that lasts longer, and a lone one without a length.
        length = sum(lasts for _, lasts in found) / steps or 1 / steps
        found = [each for each in found for _ in range(max(1, round((each[1] or 1) / length)))]
    return [frame for frame, _ in found]


def download(storage: Storage, job: JobInfo, folder: Path) -> Path:
    """Fetch a job's artifacts into a folder; returns the path of its picture.

    A file that is there already is not fetched again: it is known by its SHA-256, or by its name, which contains the
    attempt. Each file is put in place whole. Raises `JobNotSucceeded`.
    """
    picture = succeeded(job)
    for each in job.artifacts:
        path = folder / Path(each.key).name
        if not _is_there(path, each):
            write_atomic(path, stored(storage, job, each))
    return folder / Path(picture.key).name


def _is_there(path: Path, artifact: Artifact) -> bool:
    if not path.is_file():
        return False
    return artifact.sha256 is None or hashlib.sha256(path.read_bytes()).hexdigest() == artifact.sha256


def files(storage: Storage, job: JobInfo) -> list[tuple[str, bytes]]:
    """The names and bytes of a job's artifacts, its picture first; raises `JobNotSucceeded`."""
    succeeded(job)
    return [(Path(each.key).name, stored(storage, job, each)) for each in job.artifacts]

"""Downloads the objects of a finished job: its picture and its trajectory."""

import hashlib
import io
from pathlib import Path

from PIL import Image, ImageSequence

from farm.errors import JobNotSucceeded, NotFound, StorageUnavailable
from farm.jobs.records import Artifact, JobInfo, Picture, Role
from farm.objects.storage import Storage
from farm.runtime.atomic_files import write_atomic


def picture_of(job: JobInfo) -> Picture:
    """The picture of a job; raises `JobNotSucceeded` with the reason."""
    if job.picture is None:
        why = f": {job.error}" if job.error else ""
        raise JobNotSucceeded(f"job {job.id} has no picture, it is {job.state}{why}")
    return job.picture


def fetch_artifact(storage: Storage, job: JobInfo, artifact: Artifact) -> bytes:
    """An artifact of a job, checked against its SHA-256 in SQL.

    Raises `StorageUnavailable` if the hash differs.
    """
    return _checked(storage, job, artifact.key, artifact.sha256)


def _checked(storage: Storage, job: JobInfo, key: str, sha256: str | None) -> bytes:
    data = storage.get(key)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise StorageUnavailable(f"job {job.id}: {key} is not what was rendered (its SHA-256 differs)")
    return data


def find_artifact(job: JobInfo, role: Role) -> Artifact:
    """The artifact of a job in a role; raises `JobNotSucceeded`, or `NotFound` if it has none."""
    picture_of(job)
    found = next((each for each in job.artifacts if each.role == role), None)
    if found is None:
        raise NotFound(f"job {job.id} kept no {role}")
    return found


def fetch_png(storage: Storage, job: JobInfo) -> bytes:
    """The PNG of a job's picture, checked against the SHA-256 in SQL.

    Raises `JobNotSucceeded`, or `StorageUnavailable` if the hash differs.
    """
    picture = picture_of(job)
    return _checked(storage, job, picture.key, picture.sha256)


def decode(data: bytes) -> Image.Image:
    """An image from the bytes of its file, fully loaded."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def frames(data: bytes, steps: int) -> list[Image.Image]:
    """The RGB frames of an animation with `steps` frames of equal length, in order."""
    with Image.open(io.BytesIO(data)) as film:
        # Convert first: Pillow sets the duration of a WebP frame only when it reads the frame.
        found = [(frame.convert("RGB"), frame.info.get("duration", 0)) for frame in ImageSequence.Iterator(film)]
    if len(found) < steps:
        # WebP merges equal frames into a longer frame, and writes a single frame without a duration.
        length = sum(lasts for _, lasts in found) / steps or 1 / steps
        found = [each for each in found for _ in range(max(1, round((each[1] or 1) / length)))]
    return [frame for frame, _ in found]


def download(storage: Storage, job: JobInfo, folder: Path) -> Path:
    """Fetch a job's artifacts into a folder; returns the path of its picture.

    Existing files are not fetched again: they are identified by their SHA-256, or by their name, which contains the
    attempt. Each file is written atomically. Raises `JobNotSucceeded`.
    """
    picture = picture_of(job)
    for each in job.artifacts:
        path = folder / Path(each.key).name
        if not _is_there(path, each):
            write_atomic(path, fetch_artifact(storage, job, each))
    return folder / Path(picture.key).name


def _is_there(path: Path, artifact: Artifact) -> bool:
    if not path.is_file():
        return False
    return artifact.sha256 is None or hashlib.sha256(path.read_bytes()).hexdigest() == artifact.sha256


def fetch_files(storage: Storage, job: JobInfo) -> list[tuple[str, bytes]]:
    """The names and bytes of a job's artifacts, its picture first; raises `JobNotSucceeded`."""
    picture_of(job)
    return [(Path(each.key).name, fetch_artifact(storage, job, each)) for each in job.artifacts]

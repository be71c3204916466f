"""What a finished job left in the object store, fetched: its picture, and the pictures of its steps."""

import hashlib
import io
from pathlib import Path

from PIL import Image, ImageSequence

from farm.errors import JobNotSucceeded, NotFound, StorageUnavailable
from farm.jobs.records import JobInfo, Picture
from farm.objects.storage import Storage
from farm.runtime.atomic_files import write_atomic
from farm.specs.object_keys import trajectory_keys


def picture_of(job: JobInfo) -> Picture:
    """The picture of a job; raises `JobNotSucceeded` with the reason if it has none."""
    if job.picture is None:
        why = f": {job.error}" if job.error else ""
        raise JobNotSucceeded(f"job {job.id} has no picture, it is {job.state}{why}")
    return job.picture


def fetch_png(storage: Storage, job: JobInfo) -> bytes:
    """A job's picture as it is stored, checked against the SHA-256 in SQL.

    Raises `JobNotSucceeded`, or `StorageUnavailable` if what is stored is not what was rendered.
    """
    picture = picture_of(job)
    data = storage.get(picture.key)
    if hashlib.sha256(data).hexdigest() != picture.sha256:
        raise StorageUnavailable(f"job {job.id}: {picture.key} is not what was rendered (its SHA-256 differs)")
    return data


def decode(data: bytes) -> Image.Image:
    """An image from its file's bytes, read to its end."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def film_keys(job: JobInfo) -> tuple[str, str]:
    """The keys of a job's film strip and animation; raises `NotFound` if its spec did not ask for them."""
    if not job.spec.trajectory:
        raise NotFound(f"job {job.id} kept no trajectory: its spec did not ask for one (trajectory=True)")
    return trajectory_keys(picture_of(job).key)


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
    """Fetch a job's picture into a folder, and its film beside it; returns the picture's path.

    What is there already is not fetched again: the picture by its SHA-256, the film by its name, which no other
    attempt has. Each file is put in place whole. Raises `JobNotSucceeded`.
    """
    picture = picture_of(job)
    path = folder / Path(picture.key).name
    if not (path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == picture.sha256):
        write_atomic(path, fetch_png(storage, job))
    for key in film_keys(job) if job.spec.trajectory else ():
        beside = folder / Path(key).name
        if not beside.is_file():
            write_atomic(beside, storage.get(key))
    return path


def fetch_files(storage: Storage, job: JobInfo) -> list[tuple[str, bytes]]:
    """The names and bytes of a job's picture, checked, and of its film if it has one; raises `JobNotSucceeded`."""
    films = film_keys(job) if job.spec.trajectory else ()
    return [
        (Path(picture_of(job).key).name, fetch_png(storage, job)),
        *((Path(key).name, storage.get(key)) for key in films),
    ]

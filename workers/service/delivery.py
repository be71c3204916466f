"""Converts a finished picture to the objects to store and the record for SQL."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from farm.jobs.records import Artifact, Claim, Picture, Role, Success
from farm.specs.object_keys import image_key, trajectory_keys
from workers.outputs import film, png
from workers.render.request import Rendered


@dataclass(frozen=True)
class StoredObject:
    """An object to store."""

    key: str
    data: bytes
    media_type: str


@dataclass(frozen=True)
class Delivery:
    """The result of an attempt: its objects and its record."""

    success: Success
    """What SQL records once the objects are stored."""
    objects: Sequence[StoredObject]
    """The picture, then the film strip and the animation of its trajectory, if the spec asks for it."""


def delivery(claim: Claim, rendered: Rendered, worker: str) -> Delivery:
    """Encode a finished picture, under keys of its attempt."""
    origin = {
        "job": claim.job_id,
        "batch": claim.batch_name,
        "index": claim.index,
        "attempt": claim.attempt,
        "worker": worker,
    }
    data = png.encode(claim.spec, rendered, origin)
    picture = Picture(
        key=image_key(claim.batch_id, claim.index, claim.attempt, claim.spec.prompt),
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        width=rendered.width,
        height=rendered.height,
        model_sha256=rendered.model_sha256,
        render_seconds=rendered.render_seconds,
        warnings=rendered.warnings,
        device_seconds=rendered.device_seconds,
        dtype=rendered.dtype,
    )
    trajectory = list(_trajectory(picture.key, rendered))
    objects = [StoredObject(picture.key, data, "image/png"), *(stored for _, stored in trajectory)]
    return Delivery(Success(claim, picture, [artifact for artifact, _ in trajectory]), objects)


def _trajectory(picture_key: str, rendered: Rendered) -> Iterator[tuple[Artifact, StoredObject]]:
    if not rendered.frames:
        return
    strip_key, animation_key = trajectory_keys(picture_key)
    for role, key, data in (
        (Role.FILM_STRIP, strip_key, film.strip(rendered.frames)),
        (Role.ANIMATION, animation_key, film.animation(rendered.frames)),
    ):
        with Image.open(io.BytesIO(data)) as image:
            media_type, (width, height) = str(image.get_format_mimetype()), image.size
        sha256 = hashlib.sha256(data).hexdigest()
        artifact = Artifact(role, key, media_type, sha256=sha256, bytes=len(data), width=width, height=height)
        yield artifact, StoredObject(key, data, media_type)

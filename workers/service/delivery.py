"""A finished picture as the objects to be stored, and what SQL records of it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from farm.jobs.records import Claim, Picture
from farm.specs.object_keys import image_key, trajectory_keys
from workers.outputs import film, png
from workers.render.request import Rendered


@dataclass(frozen=True)
class StoredObject:
    """One object to be stored."""

    key: str
    data: bytes
    content_type: str


@dataclass(frozen=True)
class Delivery:
    """What an attempt delivers."""

    picture: Picture
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
    key = image_key(claim.batch_id, claim.index, claim.attempt, claim.spec.prompt)
    objects = [StoredObject(key, data, "image/png")]
    if rendered.frames:
        strip_key, animation_key = trajectory_keys(key)
        objects.append(StoredObject(strip_key, film.strip(rendered.frames), "image/png"))
        objects.append(StoredObject(animation_key, film.animation(rendered.frames), "image/webp"))
    picture = Picture(
        key=key,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        width=rendered.width,
        height=rendered.height,
        model_sha256=rendered.model_sha256,
        render_seconds=rendered.render_seconds,
        warnings=rendered.warnings,
        device_seconds=rendered.device_seconds,
    )
    return Delivery(picture, objects)

"""A job's row as plain data, with what the job has stored: its picture, and the artifacts beside it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import sqlalchemy as sa

from farm.jobs.records import Artifact, JobInfo, Picture, Role
from farm.jobs.schema import ArtifactRow, JobRow
from farm.jobs.states import JobState
from farm.specs.object_keys import trajectory_keys
from farm.specs.spec import RenderSpec

_COLUMNS = frozenset({"key", "sha256", "bytes", "width", "height"})
_FACTS = frozenset(field.name for field in fields(Picture)) - _COLUMNS
"""The fields of a picture that are kept as JSON: a new field needs no column."""

PICTURE_COLUMNS: Mapping[str, str] = {
    "image_key": "key",
    "image_sha256": "sha256",
    "image_bytes": "bytes",
    "width": "width",
    "height": "height",
    "model_sha256": "model_sha256",
    "render_seconds": "render_seconds",
    "device_seconds": "device_seconds",
    "warnings": "warnings",
}
"""The fields of a picture that a job's row has, too, by column: release 0.1 writes and reads only these."""


def artifact_rows(job_id: str, picture: Picture, others: Sequence[Artifact] = ()) -> Iterator[dict[str, Any]]:
    """The rows of a picture and of the artifacts beside it, to be inserted."""
    facts = {name: getattr(picture, name) for name in _FACTS}
    image = Artifact(Role.IMAGE, media_type="image/png", **{name: getattr(picture, name) for name in _COLUMNS})
    for artifact in (image, *others):
        yield {"job_id": job_id, **vars(artifact), "facts": facts if artifact is image else {}}


def artifacts_of(row: JobRow) -> tuple[Artifact, ...]:
    """The artifacts of a job, its picture first; `row.artifacts` must be loaded."""
    found = sorted(row.artifacts, key=lambda artifact: (artifact.n, artifact.role != Role.IMAGE, artifact.role))
    names = [field.name for field in fields(Artifact)]
    artifacts = tuple(Artifact(**{name: getattr(each, name) for name in names}) for each in found)
    return artifacts or tuple(_unlisted(row))


def picture_of(row: JobRow) -> Picture | None:
    """The picture of a job, None unless it succeeded; `row.artifacts` must be loaded."""
    if row.state != JobState.SUCCEEDED or not row.image_key:
        return None
    image = next((each for each in row.artifacts if (each.n, each.role) == (0, Role.IMAGE)), None)
    if image is None:
        return Picture(
            key=row.image_key,
            sha256=row.image_sha256 or "",
            bytes=row.image_bytes or 0,
            width=row.width or 0,
            height=row.height or 0,
            model_sha256=row.model_sha256 or "",
            render_seconds=row.render_seconds or 0.0,
            warnings=tuple(row.warnings or ()),
            device_seconds=row.device_seconds,
        )
    return Picture(**{name: getattr(image, name) for name in _COLUMNS}, **_known(image.facts))


def job_info(row: JobRow) -> JobInfo:
    """A job's row as plain data; `row.artifacts` must be loaded."""
    return JobInfo(
        id=row.id,
        batch_id=row.batch_id,
        index=row.position,
        spec=RenderSpec.model_validate(row.spec),
        state=JobState(row.state),
        attempt=row.attempt,
        tries=row.tries,
        worker=row.worker,
        steps_done=row.steps_done,
        seconds_per_step=row.seconds_per_step,
        error=row.error,
        queued_at=row.queued_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        picture=picture_of(row),
        lost_leases=row.lost_leases,
        not_before=row.not_before,
        avoid_worker=row.avoid_worker,
        paused=row.paused,
        reused_from=row.reused_from,
        artifacts=artifacts_of(row),
    )


def copy_artifacts(source_id: str, job_id: str, keys: Mapping[str, str]) -> sa.Insert:
    """The statement that gives a job the artifacts of another one, under the keys that theirs are mapped to."""
    changed = {
        "job_id": sa.literal(job_id),
        "key": sa.case(keys, value=ArtifactRow.key, else_=ArtifactRow.key),
    }
    columns = [column.name for column in ArtifactRow.__table__.columns]
    copied = sa.select(*(changed.get(name, getattr(ArtifactRow, name)) for name in columns))
    return sa.insert(ArtifactRow).from_select(columns, copied.where(ArtifactRow.job_id == source_id))


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that this release knows, with tuples for lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items() if name in _FACTS}


def _unlisted(row: JobRow) -> Iterator[Artifact]:
    """The artifacts of a job that a worker of an older release rendered, which lists none."""
    if row.state != JobState.SUCCEEDED or not row.image_key:
        return
    yield Artifact(
        Role.IMAGE,
        key=row.image_key,
        sha256=row.image_sha256,
        media_type="image/png",
        bytes=row.image_bytes,
        width=row.width,
        height=row.height,
    )
    if row.spec.get("trajectory"):
        strip, animation = trajectory_keys(row.image_key)
        yield Artifact(Role.FILM_STRIP, key=strip, media_type="image/png")
        yield Artifact(Role.ANIMATION, key=animation, media_type="image/webp")

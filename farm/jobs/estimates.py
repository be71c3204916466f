"""What a submission would be, without handing it in: how many pictures, which first, how long they take a device."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice

import sqlalchemy as sa

from farm.jobs.conditions import ACCEPTED, in_state
from farm.jobs.database import Database
from farm.jobs.schema import BatchRow, JobRow
from farm.jobs.states import JobState
from farm.specs.spec import RenderSpec

FIRST = 10
"""How many specs a dry run shows."""
_BATCHES, _JOBS = 50, 40


@dataclass(frozen=True)
class Speed:
    """How fast pictures of one model were made, on average."""

    seconds_per_work: float
    """Device seconds for each unit of `work`."""
    width: int
    height: int
    """Pixels of its pictures where nobody asks for a size."""


@dataclass(frozen=True)
class DryRun:
    """What a submission would be."""

    count: int
    first: tuple[RenderSpec, ...]
    """The first ten; where `seed` is not in `model_fields_set`, the submission would draw another."""
    device_seconds: float | None
    """How long its pictures would take one device, those of unmeasured models left out; None if that is all of them."""
    unmeasured: tuple[str, ...]
    """Its models of which nothing was rendered lately."""


def work(spec: RenderSpec, width: int, height: int) -> int:
    """What rendering time goes by: steps, pixels, and rows of a forward.

    `width` and `height` (pixels) are the model's own.
    """
    return spec.num_inference_steps * spec.row_pixels(width, height)


def speeds(db: Database) -> dict[str, Speed]:
    """How fast each model was lately: from the last 40 jobs of each of the newest 50 batches.

    Takes as long however many jobs there are. Where a job's device seconds are not known, the time it took is taken,
    which is longer where it shared its forwards.
    """
    seconds = sa.func.coalesce(JobRow.device_seconds, JobRow.render_seconds).label("seconds")
    found: list[sa.Row[tuple[dict[str, object], int | None, int | None, float | None]]] = []
    with db.read() as session:
        newest = sa.select(BatchRow.id).where(ACCEPTED).order_by(BatchRow.created_at.desc()).limit(_BATCHES)
        for batch_id in session.scalars(newest).all():
            found += session.execute(
                sa.select(JobRow.spec, JobRow.width, JobRow.height, seconds)
                .where(JobRow.batch_id == batch_id, in_state(JobState.SUCCEEDED), JobRow.width > 0, JobRow.height > 0)
                .order_by(JobRow.finished_at.desc())
                .limit(_JOBS)
            )
    took: dict[str, float] = {}
    done: dict[str, int] = {}
    asked: dict[str, tuple[int, int]] = {}
    own: dict[str, tuple[int, int]] = {}
    for row in found:
        spec = RenderSpec.model_validate(row.spec)
        took[spec.model] = took.get(spec.model, 0.0) + (row.seconds or 0.0)
        done[spec.model] = done.get(spec.model, 0) + work(spec, row.width, row.height)
        (own if spec.width is None and spec.height is None else asked).setdefault(spec.model, (row.width, row.height))
    return {model: Speed(took[model] / done[model], *(own.get(model) or asked[model])) for model in took if took[model]}


def dry_run(specs: Iterable[RenderSpec], known: Mapping[str, Speed]) -> DryRun:
    """What these specs would be at these speeds; holds the first ten of them only."""
    stream = iter(specs)
    first = tuple(islice(stream, FIRST))
    count, seconds = 0, 0.0
    models: set[str] = set()
    for spec in chain(first, stream):
        count += 1
        models.add(spec.model)
        if speed := known.get(spec.model):
            seconds += speed.seconds_per_work * work(spec, speed.width, speed.height)
    unmeasured = sorted(models - known.keys())
    return DryRun(count, first, seconds if models & known.keys() else None, tuple(unmeasured))

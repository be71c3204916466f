"""Dry runs of submissions: the number of pictures, the first specs, and the device seconds by recent renders."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.jobs.conditions import ACCEPTED, in_state
from farm.jobs.costs import LAST_OF_MODEL, NEWEST_BATCHES, SECONDS
from farm.jobs.database import Database
from farm.jobs.schema import BatchRow, JobRow, WorkerRow
from farm.jobs.served_models import served_models
from farm.jobs.states import JobState
from farm.specs.guidance import UNGUIDED, Guidance
from farm.specs.spec import RenderSpec

FIRST = 10
"""How many specs a dry run shows."""


@dataclass(frozen=True)
class Speed:
    """How fast pictures of one model were rendered, on average."""

    seconds_per_work: float
    """Device seconds for each unit of `work`."""
    width: int
    height: int
    """Pixels of its pictures where a spec gives no size."""
    guidance: Guidance
    """When its pictures are guided; never, if no worker reports it."""

    def seconds(self, spec: RenderSpec) -> float:
        """The device seconds that a picture would take."""
        return self.seconds_per_work * work(spec, self.width, self.height, self.guidance)


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run."""

    count: int
    first: tuple[RenderSpec, ...]
    """The first ten; where `seed` is not in `model_fields_set`, the submission would draw another."""
    device_seconds: float | None
    """The device seconds of its pictures, without those of unmeasured models; None if no model was measured."""
    unmeasured: tuple[str, ...]
    """Its models without recent pictures."""


def work(spec: RenderSpec, width: int, height: int, guidance: Guidance) -> int:
    """The number that rendering time is proportional to: steps times pixels, times the factor of its guidance.

    `width` and `height` (pixels) are the model's own.
    """
    pixels = (spec.width or width) * (spec.height or height)
    return spec.num_inference_steps * pixels * guidance.factor_of(spec)


def speeds(db: Database) -> dict[str, Speed]:
    """Return the recent speed of each model: from the last 40 jobs of each of the newest 50 batches.

    Takes constant time, however many jobs there are. A job without device seconds counts with its render seconds,
    which are longer if it shared its forwards.
    """
    found: list[sa.Row[tuple[dict[str, object], int | None, int | None, float | None]]] = []
    with db.read() as session:
        guidances = _guidances(session)
        newest = sa.select(BatchRow.id).where(ACCEPTED).order_by(BatchRow.created_at.desc()).limit(NEWEST_BATCHES)
        for batch_id in session.scalars(newest).all():
            found += session.execute(
                sa.select(JobRow.spec, JobRow.width, JobRow.height, SECONDS.label("seconds"))
                .where(JobRow.batch_id == batch_id, in_state(JobState.SUCCEEDED), JobRow.width > 0, JobRow.height > 0)
                .order_by(JobRow.finished_at.desc())
                .limit(LAST_OF_MODEL)
            )
    took: dict[str, float] = {}
    done: dict[str, int] = {}
    asked: dict[str, tuple[int, int]] = {}
    own: dict[str, tuple[int, int]] = {}
    for row in found:
        spec = RenderSpec.model_validate(row.spec)
        took[spec.model] = took.get(spec.model, 0.0) + (row.seconds or 0.0)
        guidance = guidances.get(spec.model, UNGUIDED)
        done[spec.model] = done.get(spec.model, 0) + work(spec, row.width, row.height, guidance)
        (own if spec.width is None and spec.height is None else asked).setdefault(spec.model, (row.width, row.height))
    return {
        model: Speed(seconds / done[model], *(own.get(model) or asked[model]), guidances.get(model, UNGUIDED))
        for model, seconds in took.items()
        if seconds
    }


def _guidances(session: Session) -> dict[str, Guidance]:
    """The guidance of each model that a worker serves, without models on which workers disagree."""
    found: dict[str, set[Guidance]] = {}
    for models in session.scalars(sa.select(WorkerRow.models)):
        for model in served_models(models):
            if model.guidance is not None:
                found.setdefault(model.name, set()).add(model.guidance)
    return {name: guidances.pop() for name, guidances in found.items() if len(guidances) == 1}


def dry_run(specs: Iterable[RenderSpec], known: Mapping[str, Speed]) -> DryRun:
    """The dry run of these specs at these speeds; keeps only the first ten of them in memory."""
    stream = iter(specs)
    first = tuple(islice(stream, FIRST))
    count, seconds = 0, 0.0
    models: set[str] = set()
    for spec in chain(first, stream):
        count += 1
        models.add(spec.model)
        if speed := known.get(spec.model):
            seconds += speed.seconds(spec)
    unmeasured = sorted(models - known.keys())
    return DryRun(count, first, seconds if models & known.keys() else None, tuple(unmeasured))

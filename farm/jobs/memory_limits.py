"""Memory limits of the live workers in SQL: which pictures are too large for all of them."""

from collections.abc import Iterable, Mapping, Sequence

import sqlalchemy as sa

from farm.jobs.schema import JobRow
from farm.jobs.served_models import MemoryLimit, ServedModel
from farm.specs.guidance import Guidance
from farm.specs.spec import RenderSpec

Limits = Mapping[str, Sequence[MemoryLimit]]
"""By model, the highest limit of each kind of guidance; without models that a worker serves without a limit."""


def allowed(limits: Sequence[MemoryLimit]) -> sa.ColumnElement[bool]:
    """`MemoryLimit.allows` for a job's spec, by any of these limits, in SQL."""
    width, height = (JobRow.spec[name].as_integer() for name in ("width", "height"))
    native, pixels = sa.and_(width.is_(None), height.is_(None)), sa.func.coalesce(width * height, 0)
    return sa.or_(
        *(
            sa.and_(sa.or_(~native, factor <= limit.native_factor), pixels * factor <= limit.pixels)
            for limit in limits
            for factor in [_factor(limit.guidance)]
        )
    )


def _factor(guidance: Guidance) -> sa.ColumnElement[int]:
    """`Guidance.factor_of` a job's spec, in SQL."""
    if guidance.field not in RenderSpec.model_fields:
        return sa.literal(1)
    guided = [JobRow.spec[guidance.field].as_float() > guidance.above]
    if guidance.requires:
        guided.append(JobRow.spec[guidance.requires].as_string() != "")
    return sa.case((sa.and_(*guided), guidance.factor), else_=1)


def memory_limits(workers: Iterable[Iterable[ServedModel]]) -> Limits:
    """Return the highest memory limits of any worker, given the models that each worker serves."""
    highest: dict[str, dict[Guidance, MemoryLimit]] = {}
    unlimited: set[str] = set()
    for models in workers:
        for model in models:
            if model.limit is None:
                unlimited.add(model.name)
            else:
                by_guidance = highest.setdefault(model.name, {})
                other = by_guidance.get(model.limit.guidance, model.limit)
                by_guidance[model.limit.guidance] = model.limit.raised_to(other)
    return {name: tuple(found.values()) for name, found in highest.items() if name not in unlimited}

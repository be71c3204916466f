"""What the workers hold, and which samplers that leaves to a spec."""

from collections.abc import Iterable, Mapping

from farm.errors import Problem
from farm.records import WorkerInfo
from farm.samplers import find_sampler, sampler_names
from farm.spec import RenderSpec

_SHOWN = {"diffusion": "a model that predicts noise", "flow": "a flow-matching model"}


def sampler_kinds(workers: Iterable[WorkerInfo]) -> dict[str, str]:
    """Which kind of samplers, `diffusion` or `flow`, each model takes that a living worker holds.

    A model of which no worker says it, or that two hold as different kinds, is left out.
    """
    kinds: dict[str, set[str]] = {}
    for worker in workers:
        for model in worker.models if worker.alive else ():
            kinds.setdefault(model["name"], set()).add(model.get("samplers") or "")
    return {name: found.pop() for name, found in kinds.items() if len(found) == 1 and "" not in found}


def sampler_problem(spec: RenderSpec, where: str, kinds: Mapping[str, str]) -> Problem | None:
    """What is wrong if the model of a spec is held as a kind that its sampler is not for; else None."""
    kind = kinds.get(spec.model)
    if kind is None or spec.scheduler is None or _available(spec.scheduler, kind):
        return None
    names = ", ".join(name for name in sampler_names() if _available(name, kind))
    return Problem(
        where,
        "scheduler",
        f"{spec.scheduler} can't be used with {spec.model}, {_SHOWN.get(kind, kind)}; these can: {names}",
    )


def _available(name: str, kind: str) -> bool:
    return getattr(find_sampler(name), kind, True) is not None

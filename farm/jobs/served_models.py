"""What the workers hold, and which samplers that leaves to a spec."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from farm.errors import Problem
from farm.jobs.records import WorkerInfo
from farm.specs.samplers import Recipe, find_sampler, sampler_names
from farm.specs.spec import RenderSpec


@dataclass(frozen=True)
class Kind:
    """What decides which samplers a model takes."""

    samplers: str
    """`diffusion` or `flow`: the field of a `Sampler` that it takes."""
    family: str
    """diffusers' class name of its pipeline."""

    def takes(self, scheduler: str) -> bool:
        """Whether the model can be sampled so; True for what this version can't tell."""
        sampler = find_sampler(scheduler)
        if sampler is None or self.samplers not in ("diffusion", "flow"):
            return True
        recipe: Recipe | None = getattr(sampler, self.samplers)
        return recipe is not None and recipe.fits(self.family)


def held_kinds(workers: Iterable[WorkerInfo]) -> dict[str, Kind]:
    """The kind of each model that a living worker holds.

    A worker that has not loaded a model does not know; a model that two hold as different kinds is left out.
    """
    kinds: dict[str, set[Kind]] = {}
    for worker in workers:
        for model in worker.models if worker.alive else ():
            if model.get("samplers"):
                kinds.setdefault(model["name"], set()).add(Kind(model["samplers"], model.get("family") or ""))
    return {name: found.pop() for name, found in kinds.items() if len(found) == 1}


def sampler_problem(spec: RenderSpec, where: str, kinds: Mapping[str, Kind]) -> Problem | None:
    """What is wrong with a spec if its model can't be sampled as it asks; None if nothing is, or no worker holds it."""
    kind = kinds.get(spec.model)
    if kind is None or spec.scheduler is None or kind.takes(spec.scheduler):
        return None
    names = ", ".join(name for name in sampler_names() if kind.takes(name))
    return Problem(
        where,
        "scheduler",
        f"{spec.scheduler} can't sample {spec.model} ({kind.samplers}, {kind.family or 'unknown family'}); "
        f"these can: {names}",
    )

"""The check that the models of live workers support the samplers of specs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from farm.errors import Problem
from farm.jobs.records import WorkerInfo
from farm.specs.samplers import Recipe, find_sampler, sampler_names
from farm.specs.spec import RenderSpec


@dataclass(frozen=True)
class Kind:
    """The properties of a model that decide which samplers it takes."""

    samplers: str
    """`diffusion` or `flow`: the field of a `Sampler` that it takes."""
    family: str
    """diffusers' class name of its pipeline."""

    def takes(self, scheduler: str) -> bool:
        """Whether the model supports a sampler; True for samplers and models that this version does not know."""
        sampler = find_sampler(scheduler)
        if sampler is None or self.samplers not in ("diffusion", "flow"):
            return True
        recipe: Recipe | None = getattr(sampler, self.samplers)
        return recipe is not None and recipe.fits(self.family)


def held_kinds(workers: Iterable[WorkerInfo]) -> dict[str, Kind]:
    """The kind of each model that a live worker has loaded, without models on which workers disagree."""
    kinds: dict[str, set[Kind]] = {}
    for worker in workers:
        for model in worker.models if worker.alive else ():
            if model.samplers:
                kinds.setdefault(model.name, set()).add(Kind(model.samplers, model.family or ""))
    return {name: found.pop() for name, found in kinds.items() if len(found) == 1}


def sampler_problem(spec: RenderSpec, where: str, kinds: Mapping[str, Kind]) -> Problem | None:
    """The problem of a spec whose model does not support its sampler; None if it does, or no worker has loaded it."""
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

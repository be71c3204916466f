"""Which of diffusers' noise schedulers a spec asks for, over a checkpoint's own, and its table."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import diffusers

from farm.errors import BadRequest
from farm.specs.samplers import find_sampler
from farm.specs.spec import RenderSpec
from workers.render.request import Sampling
from workers.sampling import tables

_KEPT = 512


class NoiseSchedulers:
    """The samplings of one checkpoint, made once and shared by all requests that ask for the same.

    `base` is the checkpoint's own scheduler, of a `family`. `kind` is the recipe of a `farm.specs.samplers.Sampler`
    that it takes, `diffusion` or `flow`. Safe to use from many threads.
    """

    def __init__(self, base: Any, family: str, kind: str, name: str) -> None:
        self._base, self._family, self._kind, self._name = base, family, kind, name
        self._kept: dict[Any, Sampling] = {}
        self._lock = threading.Lock()

    def sampling(
        self, spec: RenderSpec, shape: tuple[int, ...], timestep_kwargs: Callable[[Any], Mapping[str, Any]]
    ) -> Sampling:
        """Of a spec for latents of a shape; `timestep_kwargs(scheduler)` go to `set_timesteps` beside the steps.

        Raises `BadRequest` for a sampler, or a number of steps, that this checkpoint can't do.
        """
        # Only flows shift their timesteps by size.
        key = (spec.scheduler, spec.num_inference_steps, spec.eta, shape if self._kind == "flow" else None)
        with self._lock:
            found = self._kept.get(key)
        if found is None:
            found = self._made(spec, timestep_kwargs)
            with self._lock:
                if len(self._kept) >= _KEPT:
                    self._kept.clear()
                self._kept[key] = found
        return found

    def _made(self, spec: RenderSpec, timestep_kwargs: Callable[[Any], Mapping[str, Any]]) -> Sampling:
        # Building diffusers' pipeline rewrote the base's config (steps_offset, clip_sample): the file's differs.
        steps, kind, config = spec.num_inference_steps, type(self._base), dict[str, Any]()
        if spec.scheduler is not None:
            recipe = getattr(find_sampler(spec.scheduler), self._kind, None)
            if recipe is None or not recipe.fits(self._family):
                raise BadRequest(f"{self._name} ({self._family}) can't be sampled with {spec.scheduler!r}")
            kind, config = getattr(diffusers, recipe.class_name), recipe.over(self._base.config)

        def make() -> Any:
            scheduler = kind.from_config(self._base.config, **config)
            # Timesteps stay on the CPU: looking one up on a GPU would wait for it.
            kwargs = timestep_kwargs(scheduler)
            scheduler.set_timesteps(**({} if "sigmas" in kwargs else {"num_inference_steps": steps}), **kwargs)
            return scheduler

        try:
            return tables.tabulate(make, eta=spec.eta)
        except Exception as error:
            raise BadRequest(f"{self._name} can't be sampled in {steps} steps of {kind.__name__}: {error}") from error

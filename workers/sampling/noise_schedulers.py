"""The sampling of a spec: one of diffusers' noise schedulers over the checkpoint's own config, and its table."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import diffusers

from farm.errors import BadRequest
from farm.specs.samplers import find_sampler
from farm.specs.spec import RenderSpec
from workers.render.request import Sampling
from workers.sampling import tables

_MOST_KEPT = 512


class NoiseSchedulers:
    """The samplings of one checkpoint, each computed once and shared by all requests with the same options.

    `base` is the checkpoint's own scheduler, of a `family`. `kind`, `diffusion` or `flow`, selects the recipe of a
    `farm.specs.samplers.Sampler`. `sampling` may be called from any thread.
    """

    def __init__(self, base: Any, family: str, kind: str, name: str) -> None:
        self._base, self._family, self._kind, self._name = base, family, kind, name
        self._kept: dict[Any, Sampling] = {}
        self._lock = threading.Lock()

    def sampling(
        self, spec: RenderSpec, shape: tuple[int, ...], timestep_kwargs: Callable[[Any], Mapping[str, Any]]
    ) -> Sampling:
        """The sampling of a spec for latents of a shape.

        `timestep_kwargs(scheduler)` are the arguments of `set_timesteps` besides the number of steps. Raises
        `BadRequest` for a sampler, or a number of steps, that this checkpoint does not support.
        """
        # Only flows shift their timesteps by size.
        key = (spec.scheduler, spec.num_inference_steps, spec.eta, shape if self._kind == "flow" else None)
        with self._lock:
            found = self._kept.get(key)
        if found is None:
            found = self._tabulated(spec, timestep_kwargs)
            with self._lock:
                if len(self._kept) >= _MOST_KEPT:
                    del self._kept[next(iter(self._kept))]  # the oldest
                self._kept[key] = found
        return found

    def _tabulated(self, spec: RenderSpec, timestep_kwargs: Callable[[Any], Mapping[str, Any]]) -> Sampling:
        # The base's config, not the file's: diffusers' pipeline corrects steps_offset and clip_sample in it.
        steps, kind, config = spec.num_inference_steps, type(self._base), dict[str, Any]()
        if spec.scheduler is not None:
            recipe = getattr(find_sampler(spec.scheduler), self._kind, None)
            if recipe is None or not recipe.fits(self._family):
                raise BadRequest(f"{self._name} ({self._family}) can't be sampled with {spec.scheduler!r}")
            kind, config = getattr(diffusers, recipe.class_name), recipe.over(self._base.config)

        def make() -> Any:
            scheduler = kind.from_config(self._base.config, **config)
            # Timesteps stay on the CPU: reading one from a GPU would wait for the GPU.
            kwargs = timestep_kwargs(scheduler)
            scheduler.set_timesteps(**({} if "sigmas" in kwargs else {"num_inference_steps": steps}), **kwargs)
            return scheduler

        try:
            return tables.tabulate(make, eta=spec.eta)
        except Exception as error:
            raise BadRequest(f"{self._name} can't be sampled in {steps} steps of {kind.__name__}: {error}") from error

"""Samplers as tables: diffusers' noise schedulers, tabulated once and then stepped for many requests at a time.

A step of a noise scheduler is linear in the sample, the model's outputs and its noise. So the scheduler's code is run
once for each (sampler, steps) on random vectors, and least squares finds the weights of a short recurrence

    latents[i+1] = Σ_k  a[i,k]·latents[i-k] + b[i,k]·output[i-k]  +  Σ_j c[i,j]·noise[i,j]

which one multiply-add applies to all requests of a forward, whatever their samplers and steps. A scheduler that is not
linear (clipping, thresholding), uses more than `MOST_LAGS` earlier steps, or cancels so many digits that its own
rounding shows (DEIS on a flow, Heun in three steps) is stepped as an object.
"""

import copy
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch

from workers.render.request import RenderRequest, Sampling

MOST_LAGS = 4
_MOST_DRAWS = 2
_TOLERANCE = 1e-6
"""The largest residual of a recurrence, relative to the latents, in float64 and in the scheduler's own float32."""
_SHAPE = (1, 4, 8, 16)


def tabulate(make: Callable[[], Any], **step_kwargs: Any) -> Sampling:
    """The sampling of a noise scheduler with its timesteps set; without a table if it is not linear.

    `step_kwargs` are the arguments of `step` in diffusers' pipeline; those that this scheduler does not take are
    omitted.
    """
    scheduler = make()
    accepted = signature(scheduler.step).parameters
    kwargs = {key: value for key, value in step_kwargs.items() if key in accepted}
    plain = Sampling(
        name=type(scheduler).__name__,
        timesteps=tuple(float(timestep) for timestep in scheduler.timesteps),
        init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        make=make,
        step_kwargs=kwargs,
    )
    if scheduler.config.get("thresholding") or scheduler.config.get("clip_sample"):
        return plain
    run = _Run(copy.deepcopy(scheduler), plain, "generator" in accepted, torch.float64)
    for lags in range(1, MOST_LAGS + 1):
        weights = run.fit(lags)
        if weights is not None:
            if not _Run(scheduler, plain, "generator" in accepted, torch.float32).follows(weights, lags):
                return plain
            return Sampling(
                **{**vars(plain), "scales": run.scales, "lags": lags, "weights": weights, "draws": run.draws}
            )
    return plain


class _Run:
    """All steps of a scheduler on random vectors, recorded in float64."""

    def __init__(self, scheduler: Any, sampling: Sampling, draws_noise: bool, dtype: torch.dtype) -> None:
        source, generator = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
        extra = {"generator": generator} if draws_noise else {}
        sample = _randn(source).to(dtype) * sampling.init_noise_sigma
        self.samples, self.outputs, self.noises = [sample.double()], list[torch.Tensor](), list[list[torch.Tensor]]()
        scales = []
        self._linear = True
        for timestep in scheduler.timesteps:
            scaled = sample
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(sample.clone(), timestep)
            scales.append(float((scaled * sample).double().sum() / (sample * sample).double().sum()))
            self._linear &= _close(scaled, sample * scales[-1])
            output, before = _randn(source).to(dtype), generator.get_state()
            sample = scheduler.step(
                output.clone(), timestep, sample.clone(), return_dict=False, **sampling.step_kwargs, **extra
            )[0].to(dtype)
            self.outputs.append(output.double())
            self.samples.append(sample.double())
            self.noises.append(self._between(before, generator))
        self.scales = (*scales, 1.0)
        self.draws = tuple(len(noises) for noises in self.noises)

    def _between(self, before: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
        """The noises that the scheduler drew from a generator since that state."""
        after = generator.get_state()
        for dtype in (torch.float64, torch.float32):
            again = torch.Generator()
            again.set_state(before)
            noises: list[torch.Tensor] = []
            while len(noises) <= _MOST_DRAWS:
                if torch.equal(again.get_state(), after):
                    return noises
                noises.append(torch.randn(_SHAPE, generator=again, dtype=dtype).double())
        self._linear = False
        return []

    def fit(self, lags: int) -> tuple[tuple[float, ...], ...] | None:
        """The weights of a recurrence over that many pairs; None if it does not reproduce the scheduler's steps."""
        table = []
        for index, noises in enumerate(self.noises):
            terms, missing = self._terms(index, lags), 2 * max(0, lags - index - 1)
            lengths = terms.norm(dim=0).clamp_min(1e-30)
            target = self.samples[index + 1].flatten()
            found = torch.linalg.lstsq(terms / lengths, target[:, None], driver="gelsd").solution[:, 0] / lengths
            if not self._linear or not found.isfinite().all() or not _close(terms @ found, target):
                return None
            weights, pairs = found.tolist(), len(found) - len(noises)
            table.append((*weights[:pairs], *[0.0] * missing, *weights[pairs:]))
        return tuple(table)

    def follows(self, table: Sequence[Sequence[float]], lags: int) -> bool:
        """Whether a table reproduces each of its steps, except for rounding."""
        for index, row in enumerate(table):
            terms, missing = self._terms(index, lags), 2 * max(0, lags - index - 1)
            pairs = 2 * lags - missing
            weights = torch.tensor([*row[:pairs], *row[pairs + missing :]], dtype=terms.dtype)
            if not _close(terms @ weights, self.samples[index + 1].flatten()):
                return False
        return True

    def _terms(self, index: int, lags: int) -> torch.Tensor:
        """(elements, pairs and noises): the terms of a step."""
        back = range(index, max(index - lags, -1), -1)
        pairs = [term for at in back for term in (self.samples[at], self.outputs[at])]
        return torch.stack([term.flatten() for term in (*pairs, *self.noises[index])], dim=1)


def _randn(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(_SHAPE, generator=generator, dtype=torch.float64)


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= _TOLERANCE * theirs.abs().max().clamp_min(1.0))


# --- on requests


def start(request: RenderRequest, noise: torch.Tensor) -> None:
    """Set a request's latents to its first noise, scaled for its sampler, or to the state that it resumes."""
    sampling = request.sampling
    request.latents = noise * sampling.init_noise_sigma
    if not sampling.lags:
        request.scheduler = sampling.make()
    if (stopped := request.resume) is not None:
        request.latents = stopped.latents.to(noise.device)
        request.history = tuple(tensor.to(noise.device) for tensor in stopped.history)
        request.step_index = stopped.step_index
        request.generator.set_state(stopped.generator.cpu())
        if request.scheduler is not None:
            vars(request.scheduler).update(copy.deepcopy(stopped.scheduler))


def inputs(requests: Sequence[RenderRequest]) -> torch.Tensor:
    """(requests, *shape), float32: their latents, scaled as the denoiser expects them at their timesteps."""
    latents = torch.cat([request.latents for request in requests])
    scales = []
    for place, request in enumerate(requests):
        if request.scheduler is None:
            scales.append(request.sampling.scales[request.step_index])
        else:
            scales.append(1.0)
            if hasattr(request.scheduler, "scale_model_input"):
                timestep = request.scheduler.timesteps[request.step_index]
                latents[place] = request.scheduler.scale_model_input(request.latents, timestep)[0]
    return latents if all(scale == 1.0 for scale in scales) else latents * column(scales, latents)


def visible(request: RenderRequest) -> torch.Tensor:
    """(1, *shape): a request's latents, scaled as after its last step, so that they can be decoded at any step."""
    scales, index = request.sampling.scales, request.step_index
    return request.latents * scales[index] if scales and scales[index] != 1.0 else request.latents


def step(requests: Sequence[RenderRequest], outputs: torch.Tensor) -> torch.Tensor:
    """Step requests whose samplers have tables, in one multiply-add; returns their latents, (requests, *shape).

    `outputs` are the guided outputs of the denoiser. If it raises, no request has changed.
    """
    lags = max(request.sampling.lags for request in requests)
    draws = max(request.sampling.draws[request.step_index] for request in requests)
    terms, weights = [], []
    for place, request in enumerate(requests):
        sampling, index = request.sampling, request.step_index
        own = [request.latents, outputs[place : place + 1], *request.history][: 2 * sampling.lags]
        noises = _noises(request)
        filled = (request.latents,)  # with weight 0; its own latents, since 0 times another request's NaN is NaN
        terms += [*own, *filled * (2 * lags - len(own)), *noises, *filled * (draws - len(noises))]
        row, width = sampling.weights[index], 2 * sampling.lags
        missing = 2 * lags - len(own)
        weights.append([*row[: len(own)], *[0.0] * missing, *row[width:], *[0.0] * (draws - len(noises))])
    stacked = torch.cat(terms).view(len(requests), 2 * lags + draws, -1)
    factors = torch.tensor(weights, dtype=torch.float32)
    moved = torch.bmm(to_device(factors, outputs.device)[:, None], stacked).view(outputs.shape)
    for place, request in enumerate(requests):
        earlier = (request.latents, outputs[place : place + 1], *request.history)
        request.history = earlier[: 2 * (request.sampling.lags - 1)]
        request.latents = moved[place : place + 1]
    return moved


def step_object(request: RenderRequest, output: torch.Tensor) -> torch.Tensor:
    """Step a request by its own noise scheduler; returns its latents, (1, *shape)."""
    scheduler = request.scheduler
    extra = {"generator": request.generator} if "generator" in signature(scheduler.step).parameters else {}
    timestep = scheduler.timesteps[request.step_index]
    moved: torch.Tensor = scheduler.step(
        output, timestep, request.latents, return_dict=False, **request.sampling.step_kwargs, **extra
    )[0]
    request.latents = moved
    return moved


def _noises(request: RenderRequest) -> tuple[torch.Tensor, ...]:
    if request.drawn[0] != request.step_index:
        count = request.sampling.draws[request.step_index]
        shape = request.latents.shape
        noises = (torch.randn(shape, generator=request.generator) for _ in range(count))
        request.drawn = (request.step_index, tuple(to_device(noise, request.latents.device) for noise in noises))
    return request.drawn[1]


def column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """(n, 1, …): factors for the rows of a tensor."""
    return to_device(torch.tensor(values, dtype=torch.float32), like.device).view(-1, *[1] * (like.dim() - 1))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the CPU to a device."""
    # From pinned memory the copy is asynchronous.
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

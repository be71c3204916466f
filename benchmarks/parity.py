"""Compares the farm's pictures with diffusers' own, with a tolerance measured on the same machine.

Rounding in float32 depends on the kernels of the CPU or GPU, so an absolute tolerance holds on some machines only. Both
sides approximate diffusers' picture in float64; diffusers' own distance from it sets the tolerance.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from farm.specs.samplers import find_sampler
from farm.specs.spec import RenderSpec

_FACTOR = 4
"""Over 1,060 specs of all families, the farm's error was at most 2.4 times diffusers' own with any sampler."""
_FLOOR = 1e-6
"""Some last bits of a float32 near 1: diffusers' own error can be smaller by chance."""


@dataclass(frozen=True)
class Reference:
    """One picture by diffusers, (height, width, 3) in [0, 1]: in float64, and in the precision compared."""

    exact: np.ndarray
    rounded: np.ndarray

    def error(self, picture: np.ndarray) -> float:
        """The largest difference between the exact picture and one of floats in [0, 1] or of 8 bits."""
        if picture.shape != self.exact.shape:
            raise ValueError(f"the picture is {picture.shape}, diffusers' {self.exact.shape}")
        values = picture / 255 if picture.dtype == np.uint8 else picture.astype(np.float64)
        return float(np.abs(values - self.exact).max())


@dataclass(frozen=True)
class Parity:
    """The errors of both sides over the same pictures."""

    error: float
    """The farm's, against diffusers in float64."""
    own_error: float
    """diffusers' own in the precision compared."""
    shade: float = 0.0
    """What rounding the farm's pictures to 8 bits adds at most."""

    @classmethod
    def of(cls, pictures: Sequence[np.ndarray], references: Sequence[Reference]) -> "Parity":
        """The largest errors among pictures and their references."""
        errors = [reference.error(picture) for picture, reference in zip(pictures, references, strict=True)]
        own = max(reference.error(reference.rounded) for reference in references)
        return cls(max(errors), own, 0.5 / 255 if pictures[0].dtype == np.uint8 else 0.0)

    @property
    def tolerance(self) -> float:
        """The largest error that rounding explains."""
        return _FACTOR * self.own_error + _FLOOR + self.shade

    @property
    def holds(self) -> bool:
        """Whether the pictures are the same but for rounding."""
        return self.error <= self.tolerance


class References:
    """diffusers' own pipeline over a checkpoint, which draws each spec once, alone, in float64 and in `dtype`."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: str = "float32", **options: object) -> None:
        """`options` are further arguments of the pipeline's call."""
        self.rounded = _Pipe(folder, device, getattr(torch, dtype), options)
        self._exact = _Pipe(folder, device, torch.float64, options)
        self._drawn: dict[RenderSpec, Reference] = {}

    def of(self, spec: RenderSpec) -> Reference:
        """The spec's picture."""
        if spec.guidance_scale <= 1 and not self.rounded.takes("true_cfg_scale"):
            spec = spec.model_copy(update={"negative_prompt": ""})  # it guides nothing
        if spec not in self._drawn:
            with _NoiseInFloat32():
                exact = self._exact.draw(spec)
            self._drawn[spec] = Reference(exact, self.rounded.draw(spec))
        return self._drawn[spec]

    def compare(self, spec: RenderSpec, picture: np.ndarray) -> Parity:
        """A picture of the farm with diffusers' of the same spec."""
        return Parity.of([picture], [self.of(spec)])


class _NoiseInFloat32(TorchFunctionMode):
    """Draws random numbers in float32 and converts them: a generator draws other numbers in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn and kwargs.get("dtype") is torch.float64:
            return func(*args, **{**kwargs, "dtype": torch.float32}).double()
        return func(*args, **kwargs)


class _Pipe:
    """The pipeline in one precision."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, options: dict[str, object]) -> None:
        index = diffusers.DiffusionPipeline.load_config(folder)
        left_out = {part: None for part, entry in index.items() if entry == [None, None]}
        self.pipe = diffusers.DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, low_cpu_mem_usage=False, **left_out
        ).to(device)
        if dtype is torch.float64:
            self.pipe.to(dtype)  # some modules are loaded in float32 whatever is asked for
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.encode_prompt = cache(self.pipe.encode_prompt)
        self.scheduler = self.pipe.scheduler
        self._accepted = signature(self.pipe.__call__).parameters
        self._options = options

    def takes(self, argument: str) -> bool:
        """Whether the pipeline's call has that argument."""
        return argument in self._accepted

    @torch.inference_mode()
    def draw(self, spec: RenderSpec) -> np.ndarray:
        """One picture, (height, width, 3) in [0, 1]."""
        generator = torch.Generator("cpu").manual_seed(spec.seed)
        self._schedule(spec.scheduler, generator)
        # The fields of a spec are diffusers' parameters.
        wanted: dict[str, Any] = {**spec.model_dump(), "negative_prompt": spec.negative_prompt or None}
        if isinstance(self.pipe, diffusers.StableDiffusionPipeline) and spec.clip_skip:
            wanted |= {"prompt": None, "prompt_embeds": self._embed(spec.prompt, spec.clip_skip), "clip_skip": None}
        kwargs = {name: value for name, value in wanted.items() if self.takes(name) and value is not None}
        picture: np.ndarray = self.pipe(
            generator=generator,
            output_type="np",
            **kwargs,
            **self._options,
        ).images[0]
        return picture

    def _schedule(self, name: str | None, generator: torch.Generator) -> None:
        """Give the pipeline a new noise scheduler: the named sampler's, or the checkpoint's own."""
        own = self.scheduler.config
        if name is None:
            self.pipe.scheduler = type(self.scheduler).from_config(own)
            return
        kind = "diffusion" if "prediction_type" in own else "flow"
        recipe = getattr(find_sampler(name), kind)
        self.pipe.scheduler = getattr(diffusers, recipe.class_name).from_config(own, **recipe.over(own))
        if kind == "flow" and recipe.draws_noise:
            # The pipelines of flow models pass no generator to a step: it would draw from torch's global one.
            self.pipe.scheduler.step = partial(self.pipe.scheduler.step, generator=generator)

    def _embed(self, text: str, clip_skip: int) -> torch.Tensor:
        """Encode with a copy that lacks the last layers: diffusers 0.42 can't skip them with transformers 5."""
        encoder = copy.deepcopy(self.pipe.text_encoder)
        encoder.encoder.layers = encoder.encoder.layers[:-clip_skip]
        tokens = self.pipe.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt")
        embedding: torch.Tensor = encoder(tokens.input_ids.to(self.pipe.device))[0]
        return embedding

"""The baselines: diffusers' own pipeline alone, in static batches, or behind a batching server."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from benchmarks.apart import Peak, Run
from farm.specs.samplers import find_sampler
from farm.specs.spec import RenderSpec


class Diffusers:
    """A checkpoint in diffusers' pipeline, with a number of threads."""

    def __init__(self, folder: Path, device: str, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "low_cpu_mem_usage": False}
        self._pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **options).to(device)
        self._pipe.set_progress_bar_config(disable=True)
        if device.startswith("cuda"):  # as the farm does
            for part in (self._pipe.unet, self._pipe.vae):
                part.to(memory_format=torch.channels_last)
        self._device, self._own_scheduler = device, self._pipe.scheduler

    def render(self, specs: Sequence[RenderSpec], batch: int = 1) -> Run:
        """Render specs that differ only in prompt and seed, that many per call."""
        peak, began = Peak(self._device), time.monotonic()
        for start in range(0, len(specs), batch):
            self._draw(specs[start : start + batch])
        return Run(len(specs), time.monotonic() - began, peak.bytes, calls=-(-len(specs) // batch))

    def fits(self, specs: Sequence[RenderSpec]) -> float:
        """Images per second of one call; 0 if it runs out of memory."""
        try:
            return self.render(specs, len(specs)).rate
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return 0.0

    def serve(self, specs: Sequence[RenderSpec], arrivals: Sequence[float], most: int) -> Run:
        """Request-level batching: the oldest request and those of equal steps, guidance and sampler, up to `most`."""
        waiting: list[int] = []
        done: dict[int, float] = {}
        came = threading.Condition()
        peak, began, calls = Peak(self._device), time.monotonic(), 0

        def feed() -> None:
            for place, arrival in enumerate(arrivals):
                time.sleep(max(0.0, began + arrival - time.monotonic()))
                with came:
                    waiting.append(place)
                    came.notify()

        threading.Thread(target=feed, daemon=True).start()
        while len(done) < len(specs):
            with came:
                came.wait_for(lambda: waiting)
                kind = _kind(specs[waiting[0]])
                together = [place for place in waiting if _kind(specs[place]) == kind][:most]
                waiting[:] = [place for place in waiting if place not in together]
            self._draw([specs[place] for place in together])
            calls += 1
            now = time.monotonic() - began
            done.update({place: now - arrivals[place] for place in together})
        return Run(len(specs), time.monotonic() - began, peak.bytes, tuple(done.values()), calls)

    def product(self, side: int) -> float:
        """The best FLOP/s of torch's product of two square matrices."""
        left, right = torch.rand(2, side, side, device=self._device, dtype=self._pipe.unet.dtype)
        took: list[float] = []
        for _ in range(6):  # the first one warms up
            began = time.monotonic()
            left @ right
            took.append(time.monotonic() - began)
        return 2 * side**3 / min(took[1:])

    def stop(self) -> None:
        """Nothing to stop."""

    def _draw(self, specs: Sequence[RenderSpec]) -> list[Any]:
        first = specs[0]
        sampler = find_sampler(first.scheduler) if first.scheduler else None
        if sampler is None or sampler.diffusion is None:
            raise ValueError(f"no sampler of a diffusion model: {first.scheduler}")
        recipe, own = sampler.diffusion, self._own_scheduler.config
        self._pipe.scheduler = getattr(diffusers, recipe.class_name).from_config(own, **recipe.over(own))
        images: list[Any] = self._pipe(
            [spec.prompt for spec in specs],
            num_inference_steps=first.num_inference_steps,
            guidance_scale=first.guidance_scale,
            width=first.width,
            height=first.height,
            generator=[torch.Generator("cpu").manual_seed(spec.seed) for spec in specs],
            output_type="pil",
        ).images
        return images


def _kind(spec: RenderSpec) -> tuple[Any, ...]:
    return spec.num_inference_steps, spec.guidance_scale, spec.scheduler, spec.width, spec.height

"""Trains a part of the model; a stopped run resumes with the same result.

Step `n` draws all its random numbers from a generator seeded by the seed and `n`, so the state of a run has no random
state: only weights, their average, Adam's moments and the number of steps done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from farm.runtime.atomic_files import atomic_file

Module = TypeVar("Module", bound=nn.Module)
Loss = Callable[[torch.Generator], tuple[Tensor, dict[str, float]]]
"""The loss of one batch, with values to print; it draws the batch from the generator."""


@dataclass(frozen=True)
class Plan:
    """The length and the learning rate of a training run."""

    steps: int
    learning_rate: float
    seed: int = 0
    warmup_steps: int = 100
    average: float = 0.999
    save_seconds: float = 60.0

    def rate(self, step: int) -> float:
        """The learning rate of a step: a linear rise, then half a cosine down to zero at the last step."""
        rise = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def fit(
    name: str,
    model: Module,
    loss: Loss,
    plan: Plan,
    folder: Path,
    *,
    stop_at: int | None = None,
    console: Console | None = None,
) -> Module:
    """Train `model` in place and return the running average of its weights; resumes from `folder`.

    The state is in `folder/NAME.pt`, replaced atomically, so that a kill at any moment leaves a complete file.
    `stop_at` ends the run early, as a kill would.
    """
    path = folder / f"{name}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    average = deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    done = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "done": done,
        }
        with atomic_file(path) as file:
            torch.save(state, file)

    shown: dict[str, float] = {}
    saved = time.monotonic()
    last = plan.steps if stop_at is None else min(stop_at, plan.steps)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
        console=console,
    ) as progress:
        bar = progress.add_task(name, total=plan.steps, completed=done, shown="")
        while done < last:
            generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + done)
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(done)
            batch_loss, figures = loss(generator)
            optimizer.zero_grad(set_to_none=True)
            batch_loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            with torch.no_grad():
                weight = 1 - min(plan.average, (1 + done) / (10 + done))
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)
            for key, value in figures.items():
                shown[key] = value if key not in shown else 0.98 * shown[key] + 0.02 * value
            progress.update(bar, completed=done, shown="  ".join(f"{k} {v:.4f}" for k, v in shown.items()))
            if not progress.console.is_terminal and done % 100 == 0:
                progress.console.print(name, done, *(f"{k} {v:.5f}" for k, v in shown.items()))
            if time.monotonic() - saved > plan.save_seconds:
                save()
                saved = time.monotonic()
    save()
    return average

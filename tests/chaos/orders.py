"""The submissions of a chaos run, drawn from a seed, and the journal of requests and their answers."""

import json
import os
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from farm.specs.spec import RenderSpec

OWNERS = ("ann", "bob", "eve")
SIZES = ((64, 64), (64, 128))


@dataclass(frozen=True)
class Scale:
    """Number, size and duration of the jobs in a run."""

    jobs: int
    """Minimum number of jobs; the client keeps submitting until the faults are over."""
    batch: tuple[int, int]
    """Minimum and maximum number of jobs in a batch."""
    steps: tuple[int, int]
    seconds_per_step: float
    backlog: int
    """The client submits its next batch when fewer jobs than this wait."""

    @property
    def small(self) -> "Scale":
        """The same scale with batches of one to three jobs, for urgent batches."""
        return replace(self, batch=(1, 3))

    def dumps(self) -> str:
        """JSON for the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Scale":
        """Parse the output of `dumps`."""
        given = json.loads(text)
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


@dataclass(frozen=True)
class Order:
    """One submission; its name is unique."""

    name: str
    owner: str
    priority: int
    specs: tuple[RenderSpec, ...]


def order(seed: int, name: str, scale: Scale, *, priority: int | None = None) -> Order:
    """The submission with this name: the same for the same seed."""
    rng = random.Random(f"{seed}/{name}")
    specs = []
    for index in range(1, rng.randint(*scale.batch) + 1):
        width, height = rng.choice(SIZES)
        specs.append(
            RenderSpec(
                prompt=f"{name} {index}",
                seed=rng.getrandbits(32),
                num_inference_steps=rng.randint(*scale.steps),
                width=width,
                height=height,
            )
        )
    return Order(name, rng.choice(OWNERS), rng.randint(0, 89) if priority is None else priority, tuple(specs))


class Journal:
    """A file of JSON lines; each entry survives the death of the process that wrote it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, what: str, name: str, **more: object) -> None:
        """Append an entry: a request for a submission, or its answer."""
        line = json.dumps({"what": what, "name": name, "by": os.getpid(), **more}) + "\n"
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def read(self) -> list[Mapping[str, Any]]:
        """All entries, in order."""
        return [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []

    def names(self, what: str) -> set[str]:
        """Names of the submissions with an entry of this kind."""
        return {entry["name"] for entry in self.read() if entry["what"] == what}

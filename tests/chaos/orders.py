"""What is submitted under fire, drawn from a seed, and the journal of who asked for what and was told what."""

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
    """How much is rendered, and in which pieces."""

    jobs: int
    """How many at least; the client goes on until the faults are over."""
    batch: tuple[int, int]
    """Jobs of a batch, from and to."""
    steps: tuple[int, int]
    seconds_per_step: float
    backlog: int
    """The client hands in its next batch when fewer jobs than this wait."""

    @property
    def small(self) -> "Scale":
        """For what comes in between."""
        return replace(self, batch=(1, 3))

    def dumps(self) -> str:
        """As a command line carries it."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Scale":
        """What `dumps` wrote."""
        given = json.loads(text)
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


@dataclass(frozen=True)
class Order:
    """One submission; its name is nobody else's."""

    name: str
    owner: str
    priority: int
    specs: tuple[RenderSpec, ...]


def order(seed: int, name: str, scale: Scale, *, priority: int | None = None) -> Order:
    """The submission of that name: always the same for the same seed."""
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
    """Lines of JSON that outlive whoever wrote them, killed or not."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, what: str, name: str, **more: object) -> None:
        """Note what somebody is about to do, or was told, of a submission."""
        line = json.dumps({"what": what, "name": name, "by": os.getpid(), **more}) + "\n"
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def read(self) -> list[Mapping[str, Any]]:
        """Everything in it, in order."""
        return [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []

    def names(self, what: str) -> set[str]:
        """The submissions of which that was noted."""
        return {entry["name"] for entry in self.read() if entry["what"] == what}

"""A request inside the engine, with what the engine needs beside it."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from farm.errors import FarmError
from workers.engine.step_scheduler import ForwardKey
from workers.render.pipeline import Pipeline
from workers.render.request import Rendered, RenderRequest, Snapshot

Ending = Callable[[Snapshot | None], FarmError]
"""What a request ends with that leaves before its picture is done, given its state if it had begun."""


@dataclass(eq=False)
class Render:
    """One request of one engine."""

    request: RenderRequest
    pipeline: Pipeline
    key: ForwardKey
    future: Future[Rendered] = field(default_factory=Future)
    looks: list[tuple[int, Future[Snapshot]]] = field(default_factory=list)
    """Who wants its state, from which number of steps on."""
    unwanted: FarmError | None = None
    """What it ends with when its picture is decoded, which nobody wants any more."""

    @property
    def state(self) -> Snapshot | None:
        """None before its first step."""
        return self.request.snapshot(self.pipeline.sha256) if self.request.step_index else None


def cancel(look: Future[Snapshot]) -> None:
    """Tell who wants a state that there is none to come."""
    look.cancel()
    look.set_running_or_notify_cancel()  # without it `wait` would not take it for done

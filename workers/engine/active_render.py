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
    snapshots: list[tuple[int, Future[Snapshot]]] = field(default_factory=list)
    """Futures of its state, each from a number of steps on."""
    unwanted: FarmError | None = None
    """The error that it ends with after its last decode, if it was cancelled or handed back meanwhile."""

    @property
    def state(self) -> Snapshot | None:
        """None before its first step."""
        return self.request.snapshot(self.pipeline.sha256) if self.request.step_index else None


def cancel(future: Future[Snapshot]) -> None:
    """Cancel the future of a snapshot that will not be taken."""
    future.cancel()
    future.set_running_or_notify_cancel()  # without it `wait` would not take it for done

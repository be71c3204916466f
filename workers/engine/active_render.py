"""The engine's record of a request: its pipeline, its forward key and its futures."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from farm.errors import FarmError
from workers.engine.step_scheduler import ForwardKey
from workers.render.pipeline import Pipeline
from workers.render.request import Rendered, RenderRequest, Snapshot

Ending = Callable[[Snapshot | None], FarmError]
"""Makes the error of a request that ends without a picture, from its state if it has begun."""


@dataclass(eq=False)
class ActiveRender:
    """A request in the engine, from acceptance to its end."""

    request: RenderRequest
    pipeline: Pipeline
    key: ForwardKey
    future: Future[Rendered] = field(default_factory=Future)
    snapshots: list[tuple[int, Future[Snapshot]]] = field(default_factory=list)
    """Pending snapshots, each with the number of steps from which on it is taken."""
    cancelled_with: FarmError | None = None
    """The error with which it ends after its decoding, if it was cancelled during that."""

    @property
    def state(self) -> Snapshot | None:
        """Its snapshot; None before its first step."""
        return self.request.snapshot(self.pipeline.sha256) if self.request.step_index else None


def cancel(snapshot: Future[Snapshot]) -> None:
    """Cancel a pending snapshot, and wake its waiters."""
    snapshot.cancel()
    snapshot.set_running_or_notify_cancel()  # otherwise `wait` does not count it as done

"""The handle of an owner: steers all of its batches."""

from farm.jobs.steering import Steering


class Owner:
    """The owner of batches; `pause` includes future batches."""

    def __init__(self, steering: Steering, name: str) -> None:
        self._steering = steering
        self.name = name

    def cancel(self) -> int:
        """Cancel all of its jobs that have not ended; returns how many."""
        return self._steering.cancel(owner=self.name)

    def pause(self) -> int:
        """Pause all of its batches until `resume`; returns how many jobs have not ended."""
        return self._steering.pause(owner=self.name)

    def resume(self) -> int:
        """Resume all of its batches; returns how many jobs have not ended."""
        return self._steering.resume(owner=self.name)

    def retry(self) -> int:
        """Retry all of its failed jobs with all tries; returns how many."""
        return self._steering.retry(owner=self.name)

    def __repr__(self) -> str:
        return f"<Owner {self.name!r}>"

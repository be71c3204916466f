"""All that somebody has handed in, as they steer it."""

from farm.jobs.steering import Steering


class Owner:
    """Whoever submits under a name: all batches of theirs, those to come included."""

    def __init__(self, steering: Steering, name: str) -> None:
        self._steering = steering
        self.name = name

    def cancel(self) -> int:
        """Cancel what has not ended of theirs; returns how many jobs that were."""
        return self._steering.cancel(owner=self.name)

    def pause(self) -> int:
        """Render nothing of theirs until `resume`; returns how many jobs that holds up now."""
        return self._steering.pause(owner=self.name)

    def resume(self) -> int:
        """Go on with what is theirs; returns how many jobs have not ended."""
        return self._steering.resume(owner=self.name)

    def retry(self) -> int:
        """Give all their failed jobs all their tries anew; returns how many jobs that were."""
        return self._steering.retry(owner=self.name)

    def __repr__(self) -> str:
        return f"<Owner {self.name!r}>"

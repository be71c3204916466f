"""The wait before a retry."""

import random
from dataclasses import dataclass

_FACTOR = 4.0


@dataclass(frozen=True)
class Backoff:
    """Exponential back-off with jitter, so that jobs that failed together are not retried together.

    See Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015: half of the wait is random.
    """

    base_seconds: float
    max_seconds: float

    def most_seconds(self, failures: int) -> float:
        """The longest wait after `failures` failures (from 1): four times as long after each."""
        return min(self.max_seconds, self.base_seconds * _FACTOR ** (failures - 1))

    def seconds(self, failures: int) -> float:
        """A random wait after `failures` failures, in the upper half of `most_seconds`."""
        return self.most_seconds(failures) * random.uniform(0.5, 1.0)  # noqa: S311 - not for secrets

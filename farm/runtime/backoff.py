"""The wait between a failure and the next try."""

import random
from dataclasses import dataclass

_FACTOR = 4.0
_MOST_EXPONENT = 64


@dataclass(frozen=True)
class Backoff:
    """Exponential back-off with jitter: clients that failed together do not retry together.

    See Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015: half of the wait is random.
    """

    base_seconds: float
    max_seconds: float

    def most_seconds(self, failures: int) -> float:
        """The longest wait after that many failures (at least 1): times four for each, up to `max_seconds`."""
        exponent = min(failures - 1, _MOST_EXPONENT)  # a float overflows after some hundred failures
        return min(self.max_seconds, self.base_seconds * _FACTOR**exponent)

    def seconds(self, failures: int) -> float:
        """A random wait after that many failures, between half of `most_seconds` and `most_seconds`."""
        return self.most_seconds(failures) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret depends on it

"""The states of a job, and who moves it out of each."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class JobState(StrEnum):
    """Where a job is. Terminal states never change."""

    # In SQL's backlog. The dispatcher moves it to queued, a cancel to cancelled.
    PENDING = "pending"
    # Its message is in Redis. A worker's claim moves it to running, the dispatcher back to pending when the
    # message is gone, a cancel to cancelled.
    QUEUED = "queued"
    # Under a worker's lease. That worker moves it on to one of the terminal states, or back to pending when it
    # drains or meets an error worth another try; the dispatcher, back to pending when the lease is lost.
    RUNNING = "running"
    # Its picture is in the object store.
    SUCCEEDED = "succeeded"
    # Out of tries, a bad spec, or set aside because it kept losing its workers.
    FAILED = "failed"
    # A person cancelled it, and nothing renders it any more.
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether nothing changes this state any more."""
        return not TRANSITIONS[self]


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = MappingProxyType(
    {
        JobState.PENDING: frozenset({JobState.QUEUED, JobState.CANCELLED}),
        JobState.QUEUED: frozenset({JobState.RUNNING, JobState.PENDING, JobState.CANCELLED}),
        JobState.RUNNING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.PENDING, JobState.CANCELLED}),
        JobState.SUCCEEDED: frozenset(),
        JobState.FAILED: frozenset(),
        JobState.CANCELLED: frozenset(),
    }
)
"""Which states may follow which."""

ACTIVE = tuple(state for state in JobState if TRANSITIONS[state])
"""The states that are not terminal."""

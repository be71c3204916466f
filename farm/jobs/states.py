"""The states of a job, who moves it out of each, and what becomes of its attempts."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class JobState(StrEnum):
    """Where a job is. Terminal states never change, but for a failed job that a person wants tried anew."""

    # In SQL's backlog. The dispatcher moves it to queued, or to succeeded if the same work has been done before; a
    # cancel, to cancelled.
    PENDING = "pending"
    # Its message is in Redis. A worker's claim moves it to running, or back to pending when it had no memory for it;
    # the dispatcher, back to pending when the message is gone; a pause, back to pending; a cancel, to cancelled.
    QUEUED = "queued"
    # Under a worker's lease. That worker moves it on to one of the terminal states, or back to pending when it
    # drains, when the job is paused, or at an error worth another try; the dispatcher, back to pending when the lease
    # is lost.
    RUNNING = "running"
    # Its picture is in the object store.
    SUCCEEDED = "succeeded"
    # Out of tries, a bad spec, or set aside because it kept losing its workers. A person's retry, and nothing else,
    # moves it to pending: its tries begin anew, its attempts count on.
    FAILED = "failed"
    # A person cancelled it, and nothing renders it any more.
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether the job has ended: nothing but a person's retry of a failed one changes this state any more."""
        return self not in ACTIVE


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = MappingProxyType(
    {
        JobState.PENDING: frozenset({JobState.QUEUED, JobState.SUCCEEDED, JobState.CANCELLED}),
        JobState.QUEUED: frozenset({JobState.RUNNING, JobState.PENDING, JobState.CANCELLED}),
        JobState.RUNNING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.PENDING, JobState.CANCELLED}),
        JobState.SUCCEEDED: frozenset(),
        JobState.FAILED: frozenset({JobState.PENDING}),
        JobState.CANCELLED: frozenset(),
    }
)
"""Which states may follow which."""

ACTIVE = (JobState.PENDING, JobState.QUEUED, JobState.RUNNING)
"""The states that are not terminal."""


class Outcome(StrEnum):
    """What became of an attempt."""

    SUCCEEDED = "succeeded"
    # By an error that no other try can help, or by one too many.
    FAILED = "failed"
    # By an error; the job went back to the backlog.
    RETRIED = "retried"
    # Its lease ran out.
    LOST = "lost"
    # Its worker drained, or the job was paused; the next attempt goes on from there.
    HANDED_BACK = "handed_back"
    CANCELLED = "cancelled"

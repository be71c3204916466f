"""The states of a job, the transitions between them, and the outcomes of attempts."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class JobState(StrEnum):
    """The state of a job. Terminal states are final, except that failed jobs can be retried."""

    # In the backlog in SQL. The dispatcher moves it to queued, or to succeeded with a copy of the same work's picture;
    # a cancel, to cancelled.
    PENDING = "pending"
    # Its message is in Redis. A worker's claim moves it to running, or back to pending if the worker lacks the memory;
    # the dispatcher, back to pending if the message is lost; a pause, back to pending; a cancel, to cancelled.
    QUEUED = "queued"
    # Under a worker's lease. The worker moves it to a terminal state, or back to pending when it drains, when the job
    # is paused, or after a retryable error; the dispatcher, back to pending when the lease has expired.
    RUNNING = "running"
    # Its picture is in the object store.
    SUCCEEDED = "succeeded"
    # Out of tries, an invalid spec, or set aside after too many lost leases. Only a user's retry moves it, to pending:
    # that resets its tries, but not its attempts.
    FAILED = "failed"
    # Cancelled by a user; it is no longer rendered.
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether the job has ended: only a retry of a failed job changes its state again."""
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
"""The states that may follow each state."""

ACTIVE = (JobState.PENDING, JobState.QUEUED, JobState.RUNNING)
"""The states that are not terminal."""


class Outcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    # An error that is not retryable, or an error at the last try.
    FAILED = "failed"
    # An error; the job went back to the backlog.
    RETRIED = "retried"
    # Its lease expired.
    LOST = "lost"
    # Its worker drained, or the job was paused; the next attempt resumes it.
    HANDED_BACK = "handed_back"
    CANCELLED = "cancelled"

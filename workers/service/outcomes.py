"""What `render_job` returns: how the attempt of a job ended on this worker."""

from dataclasses import dataclass
from typing import TypeAlias

from farm.errors import ErrorClass
from farm.jobs.states import Outcome


@dataclass(frozen=True)
class NothingToClaim:
    """The job is not queued any more, or not for this worker now.

    Or SQL was unavailable: then the dispatcher sends another message.
    """


@dataclass(frozen=True)
class Succeeded:
    """The picture is stored and recorded."""

    url: str
    recorded: Outcome = Outcome.SUCCEEDED


@dataclass(frozen=True)
class Cancelled:
    """The render was stopped because its job was cancelled."""

    recorded: Outcome
    """What SQL says of the attempt: `LOST` where the claim no longer held, or SQL stayed away."""


@dataclass(frozen=True)
class HandedBack:
    """The job is back in the backlog at no cost to it."""

    why: str
    recorded: Outcome
    """See `Cancelled`."""


@dataclass(frozen=True)
class LostLease:
    """Another worker renders the job, under a later attempt."""

    recorded: Outcome = Outcome.LOST


@dataclass(frozen=True)
class Failed:
    """An error ended the attempt."""

    error: Exception
    recorded: Outcome
    """See `Cancelled`."""
    error_class: ErrorClass | None
    """What the job needs to succeed; None where SQL stayed away and nothing was recorded."""


Ended: TypeAlias = Succeeded | Cancelled | HandedBack | LostLease | Failed
"""How a claimed attempt ended."""
RenderOutcome: TypeAlias = NothingToClaim | Ended

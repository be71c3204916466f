"""Every error the farm raises on purpose, as one tree.

    FarmError
    ├── InvalidInput            prompts or specs that can't be accepted; nothing was submitted
    ├── NotFound                no batch or job of that name
    ├── NotConfigured           no settings in the environment, no embedded farm in this home
    ├── AlreadyRunning          a second embedded farm in the same home
    ├── PartFailed              a part of the embedded farm did not come up
    ├── SchemaMismatch          the database is older or newer than this version
    ├── ServiceUnavailable      a service does not answer
    │   ├── DatabaseUnavailable
    │   ├── BrokerUnavailable
    │   └── StorageUnavailable
    ├── ModelError              a checkpoint can't be found, read, or used
    │   └── ModelUnavailable    not just now: where it lies does not answer
    ├── RenderError             one render went wrong
    │   ├── BadRequest          the request itself is at fault: another try can't help
    │   ├── BadImage            NaN or nothing in the latents
    │   ├── OutOfMemory         it does not fit on this device even alone
    │   └── EngineFailed        the loop broke under the request
    ├── RenderCancelled         the render was stopped because its job was cancelled
    ├── RenderHandedBack        the render was stopped because its worker drains
    ├── JobNotSucceeded         a picture was asked of a job that has none
    ├── NotEnded                a batch that is to be deleted and has jobs which have not ended
    └── KeyUsed                 a submission's key that belongs to another one

Whether and where another try can help is `error_class` on the class; no code reads messages to decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar


class ErrorClass(StrEnum):
    """What a failed render needs to succeed."""

    # Time: a service was away, a device or the render loop broke.
    TRANSIENT = "transient"
    # Another worker, one with more memory.
    OUT_OF_MEMORY = "out_of_memory"
    # Another spec, or another model: tried again, unchanged, it fails again.
    BAD_INPUT = "bad_input"
    # A person's look: it kept losing its workers, and may be what kills them.
    POISON = "poison"

    @property
    def retryable(self) -> bool:
        """Whether the same thing may succeed when tried again, unchanged."""
        return self in (ErrorClass.TRANSIENT, ErrorClass.OUT_OF_MEMORY)


class FarmError(Exception):
    """Base of everything the farm raises on purpose."""

    error_class: ClassVar[ErrorClass] = ErrorClass.BAD_INPUT

    @property
    def retryable(self) -> bool:
        """Whether the same thing may succeed when tried again, unchanged."""
        return self.error_class.retryable


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one prompt of a submission.

    `where` is what a person can go to: `prompts.csv:12` or `spec 3`; `field` is the column or the
    spec's field, empty when the whole line is at fault.
    """

    where: str
    field: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.field, self.message) if part)


class InvalidInput(FarmError):
    """Raised when prompts or specs can't be accepted: all problems at once, and nothing submitted."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class NotFound(FarmError):
    """Raised when no batch or job has that name or id."""


class NotConfigured(FarmError):
    """Raised when there are neither `FARM_*` settings nor an embedded farm to talk to."""


class AlreadyRunning(FarmError):
    """Raised when an embedded farm already runs in this home."""


class PartFailed(FarmError):
    """Raised when a part of the embedded farm does not come up; carries its last lines."""


class SchemaMismatch(FarmError):
    """Raised when the database's schema is not the one this version works with."""


class ServiceUnavailable(FarmError):
    """Raised when a service the farm stands on does not answer."""

    error_class = ErrorClass.TRANSIENT


class DatabaseUnavailable(ServiceUnavailable):
    """Raised when the SQL database does not answer."""


class BrokerUnavailable(ServiceUnavailable):
    """Raised when Redis does not answer."""


class StorageUnavailable(ServiceUnavailable):
    """Raised when the object store does not answer."""


class ModelError(FarmError):
    """Raised when a checkpoint can't be found, read or used; names the part at fault."""


class ModelUnavailable(ModelError):
    """Raised when a checkpoint can't be had just now: where it lies does not answer, or a device is out of memory."""

    error_class = ErrorClass.TRANSIENT


class RenderError(FarmError):
    """Raised when one render goes wrong."""

    error_class = ErrorClass.TRANSIENT


class BadRequest(RenderError):
    """Raised when the request itself is at fault, such as a sampler its model can't use."""

    error_class = ErrorClass.BAD_INPUT


class BadImage(RenderError):
    """Raised when a request's latents hold NaN or infinity; names the step."""

    error_class = ErrorClass.BAD_INPUT


class OutOfMemory(RenderError):
    """Raised when a request does not fit on its device even alone; says what it would need.

    Another worker may have more.
    """

    error_class = ErrorClass.OUT_OF_MEMORY


class EngineFailed(RenderError):
    """Raised for every request in the engine when its loop breaks under them."""


class RenderCancelled(FarmError):
    """Raised when a render was stopped because its job was cancelled or its lease lost."""


class RenderHandedBack(FarmError):
    """Raised when a render was stopped because its worker drains; the job goes back to the backlog."""


class JobNotSucceeded(FarmError):
    """Raised when the picture of a job is asked for that did not succeed; says why."""


class NotEnded(FarmError):
    """Raised when a batch is to be deleted while some of its jobs have not ended."""


class KeyUsed(FarmError):
    """Raised when a submission's key was used before, for something else."""

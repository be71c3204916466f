"""Every error the farm raises on purpose, as one tree.

    FarmError
    ├── InvalidInput            prompts or specs that can't be accepted; nothing was submitted
    ├── NotFound                no batch or job has that name
    ├── NotConfigured           no settings in the environment, no embedded farm in this home
    ├── AlreadyRunning          a second embedded farm in the same home
    ├── PartFailed              a part of the embedded farm did not come up
    ├── SchemaMismatch          the database is older or newer than this version
    ├── ServiceUnavailable      a service does not answer
    │   ├── DatabaseUnavailable
    │   ├── BrokerUnavailable
    │   └── StorageUnavailable
    ├── ModelError              a checkpoint can't be found, read, or used
    │   └── ModelUnavailable    a checkpoint is temporarily unavailable
    ├── RenderError             one render went wrong
    │   ├── BadRequest          the request is invalid: a retry can't help
    │   ├── BadImage            the latents contain NaN or infinity
    │   ├── OutOfMemory         the request does not fit on this device even alone
    │   └── EngineFailed        the engine's loop failed
    ├── RenderCancelled         the render was stopped because its job was cancelled
    ├── RenderHandedBack        the render was stopped because its worker drains
    ├── JobNotSucceeded         the job has no picture
    ├── NotEnded                a batch with unfinished jobs can't be deleted
    └── KeyUsed                 the key belongs to another submission

`error_class` on the class says whether and where a retry can help; no code reads messages to decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar


class ErrorClass(StrEnum):
    """What a failed render needs to succeed."""

    # Time: a service was unavailable, or a device or the render loop failed.
    TRANSIENT = "transient"
    # A worker with more memory.
    OUT_OF_MEMORY = "out_of_memory"
    # Another spec or another model: an unchanged retry fails again.
    BAD_INPUT = "bad_input"
    # An investigation: the job lost its worker repeatedly, and may have killed it.
    POISON = "poison"

    @property
    def retryable(self) -> bool:
        """Whether an unchanged retry may succeed."""
        return self in (ErrorClass.TRANSIENT, ErrorClass.OUT_OF_MEMORY)


class FarmError(Exception):
    """Base of everything the farm raises on purpose."""

    error_class: ClassVar[ErrorClass] = ErrorClass.BAD_INPUT

    @property
    def retryable(self) -> bool:
        """Whether an unchanged retry may succeed."""
        return self.error_class.retryable


@dataclass(frozen=True)
class Problem:
    """One error in one prompt of a submission.

    `where` locates the prompt: `prompts.csv:12` or `spec 3`. `field` is the column or the spec's field, empty if the
    error concerns the whole line.
    """

    where: str
    field: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.field, self.message) if part)


class InvalidInput(FarmError):
    """Raised when prompts or specs can't be accepted; lists all problems, and nothing was submitted."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class NotFound(FarmError):
    """Raised when no batch or job has that name or id."""


class NotConfigured(FarmError):
    """Raised when the environment has no `FARM_*` settings and this home has no embedded farm."""


class AlreadyRunning(FarmError):
    """Raised when an embedded farm already runs in this home."""


class PartFailed(FarmError):
    """Raised when a part of the embedded farm does not come up; contains its last output lines."""


class SchemaMismatch(FarmError):
    """Raised when the database's schema is not the one this version works with."""


class ServiceUnavailable(FarmError):
    """Raised when a service that the farm depends on does not answer."""

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
    """Raised when a checkpoint is temporarily unavailable: its store does not answer, or a device is out of memory."""

    error_class = ErrorClass.TRANSIENT


class RenderError(FarmError):
    """Raised when a render fails."""

    error_class = ErrorClass.TRANSIENT


class BadRequest(RenderError):
    """Raised when the request is invalid, for example a sampler that its model can't use."""

    error_class = ErrorClass.BAD_INPUT


class BadImage(RenderError):
    """Raised when a request's latents contain NaN or infinity; names the step."""

    error_class = ErrorClass.BAD_INPUT


class OutOfMemory(RenderError):
    """Raised when a request does not fit on its device even alone; states the memory it needs.

    Another worker may have more memory.
    """

    error_class = ErrorClass.OUT_OF_MEMORY


class EngineFailed(RenderError):
    """Raised for every request in the engine when its loop fails."""


class RenderCancelled(FarmError):
    """Raised when a render was stopped because its job was cancelled or its lease lost."""


class RenderHandedBack(FarmError):
    """Raised when a render was stopped because its worker drains; the job goes back to the backlog."""


class JobNotSucceeded(FarmError):
    """Raised when the picture of an unsuccessful job is requested; states why the job has none."""


class NotEnded(FarmError):
    """Raised when a batch with unfinished jobs is deleted."""


class KeyUsed(FarmError):
    """Raised when a submission's key was already used for a different submission."""

"""The problems of a submission: the first are kept, the others counted."""

from dataclasses import dataclass
from typing import Any

from farm.errors import InvalidInput, Problem
from farm.specs.spec import RenderSpec

MAX_KEPT = 1000
"""The most problems that are kept, so that a million bad rows need no more memory than a thousand."""


@dataclass(frozen=True)
class MoreProblems(Problem):
    """The last problem of a long list: the number of those that were only counted."""

    count: int


class Problems:
    """The problems found so far, in order; true if there are any."""

    def __init__(self) -> None:
        self._kept: list[Problem] = []
        self._more = 0

    def add(self, *found: Problem) -> None:
        """Add problems in the order in which they were found."""
        room = MAX_KEPT - len(self._kept)
        self._kept += found[:room]
        self._more += max(0, len(found) - room)

    def __bool__(self) -> bool:
        return bool(self._kept)

    def error(self) -> InvalidInput:
        """The error with all of them."""
        return InvalidInput([*self._kept, *([more(self._more)] if self._more else [])])


def parsed(values: Any, where: str) -> RenderSpec:
    """The spec of these fields; raises `InvalidInput`, even for values that no message can show."""
    try:
        return RenderSpec.parse(values, where)
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, a list 10,000 deep
        raise InvalidInput([Problem(where, "", f"has a value that can't be read: {error}")]) from error


def more(count: int) -> MoreProblems:
    """The problem that stands for this many others."""
    return MoreProblems("", "", f"… and {count:,} more", count)

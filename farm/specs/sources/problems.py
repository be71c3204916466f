"""The problems of a submission: the first ones are kept, the rest is counted."""

from dataclasses import dataclass
from typing import Any

from farm.errors import InvalidInput, Problem
from farm.specs.spec import RenderSpec

MAX_KEPT = 1000
"""How many problems are kept as text, so that a million bad rows take no more memory than a thousand."""


@dataclass(frozen=True)
class MoreProblems(Problem):
    """The last entry of a list: the number of problems that were only counted."""

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
        """The error that contains all problems."""
        return InvalidInput([*self._kept, *([more(self._more)] if self._more else [])])


def parsed(values: Any, where: str) -> RenderSpec:
    """The spec of these fields; raises `InvalidInput`, also for values that cannot be printed."""
    try:
        return RenderSpec.parse(values, where)
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, a list 10,000 deep
        raise InvalidInput([Problem(where, "", f"has a value that can't be read: {error}")]) from error


def more(count: int) -> MoreProblems:
    """The entry for `count` further problems."""
    return MoreProblems("", "", f"… and {count:,} more", count)

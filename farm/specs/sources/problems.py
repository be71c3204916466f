"""All that is wrong with a submission, as it is found: the first of it kept, the rest counted."""

from dataclasses import dataclass
from typing import Any

from farm.errors import InvalidInput, Problem
from farm.specs.spec import RenderSpec

MAX_KEPT = 1000
"""How many problems are kept word for word, so that a million bad rows take no more memory than a thousand."""


@dataclass(frozen=True)
class MoreProblems(Problem):
    """Stands at the end for the problems that were counted only."""

    count: int


class Problems:
    """What was found so far, in order; true when that is anything."""

    def __init__(self) -> None:
        self._kept: list[Problem] = []
        self._more = 0

    def add(self, *found: Problem) -> None:
        """Note problems, in the order they were found."""
        room = MAX_KEPT - len(self._kept)
        self._kept += found[:room]
        self._more += max(0, len(found) - room)

    def __bool__(self) -> bool:
        return bool(self._kept)

    def error(self) -> InvalidInput:
        """The error that says all of it."""
        return InvalidInput([*self._kept, *([more(self._more)] if self._more else [])])


def parsed(values: Any, where: str) -> RenderSpec:
    """The spec of these fields; raises `InvalidInput`, also for values that can't even be shown in a message."""
    try:
        return RenderSpec.parse(values, where)
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, a list 10,000 deep
        raise InvalidInput([Problem(where, "", f"has a value that can't be read: {error}")]) from error


def more(count: int) -> MoreProblems:
    """The line that stands for so many problems."""
    return MoreProblems("", "", f"… and {count:,} more", count)

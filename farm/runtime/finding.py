"""The result of a check: each package checks its own parts of the farm, and `farm doctor` prints the results."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """The result of a check."""

    part: str
    level: Literal["ok", "warn", "bad"]
    what: str
    """The state of the part."""
    do: str = ""
    """What to do about it; empty if nothing is wrong."""

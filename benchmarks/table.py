"""A Markdown table of rows, with the conditions of the run."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version

from benchmarks.rows import Row

_PACKAGES = ("torch", "diffusers", "transformers")


def table(rows: Sequence[Row], facts: Sequence[str]) -> str:
    """The Markdown text: the rows, then the facts."""
    head = ("#", "what", "value", "spread", "goal", "", "farm", "other side", "peak farm", "peak other")
    lines = [head, tuple("---" for _ in head), *(_cells(row) for row in rows)]
    shown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([shown, "", *(f"- {fact}" for fact in facts)])


def where() -> str:
    """Versions and number of cores."""
    versions = ", ".join(f"{package} {version(package)}" for package in _PACKAGES)
    return f"Python {platform.python_version()}, {versions}, {os.cpu_count()} cores, {platform.machine()}"


def _cells(row: Row) -> tuple[str, ...]:
    low_high = "" if row.spread is None else f"{row.spread[0]:.2f} to {row.spread[1]:.2f}"
    met = {True: "met", False: "**miss**", None: ""}[row.met]
    memory = [f"{size / 2**20:.0f} MiB" if size else "" for size in (row.farm_bytes, row.other_bytes)]
    return (
        str(row.number),
        row.what,
        f"{row.value:.2f}{row.unit}",
        low_high,
        row.goal,
        met,
        row.farm,
        row.other,
        *memory,
    )

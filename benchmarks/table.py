"""The rows of a benchmark as a Markdown table and as JSON, with the command, the versions and the machine."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from benchmarks.rows import Row

_PACKAGES = ("torch", "diffusers", "transformers")


def publish(
    module: str, arguments: Sequence[str] | None, rows: Sequence[Row], path: Path | None, facts: Sequence[str] = ()
) -> int:
    """Print the table of a benchmark, and write its rows to a JSON file if `path` is given; 1 if a goal was missed."""
    command = shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])
    facts = [f"`{command}`", _machine(), *facts]
    print(table(rows, facts))
    if path is not None:
        path.write_text(json.dumps({"facts": facts, "rows": [asdict(row) for row in rows]}, indent=1))
    return int(any(row.met is False for row in rows))


def table(rows: Sequence[Row], facts: Sequence[str]) -> str:
    """Markdown: a line for each row, then the facts."""
    head = ("#", "what", "value", "spread", "goal", "", "farm", "other side", "peak farm", "peak other")
    lines = [head, tuple("---" for _ in head), *(_cells(row) for row in rows)]
    shown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([shown, "", *(f"- {fact}" for fact in facts)])


def _machine() -> str:
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

"""Prompts from arguments and from text, CSV and JSONL files, as specs; every problem with its file and line."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farm.errors import InvalidInput, Problem
from farm.spec import RenderSpec

SUFFIXES = (".txt", ".csv", ".jsonl")


@dataclass(frozen=True)
class Row:
    """What one line says, and where it stands."""

    where: str
    values: Mapping[str, Any] | str | Problem | RenderSpec
    """A spec's fields, a prompt alone, a whole spec, or what is wrong with the line."""


def is_file(argument: str) -> bool:
    """Whether an argument means a file of prompts and not a prompt."""
    return argument.endswith(SUFFIXES) or (len(argument) < 256 and "\n" not in argument and Path(argument).is_file())


def rows(arguments: Iterable[str]) -> Iterator[Row]:
    """Each prompt among the arguments, and each line of the files among them, one by one."""
    for number, argument in enumerate(arguments, 1):
        if is_file(argument):
            yield from file_rows(Path(argument))
        else:
            yield Row(f"prompt {number}", argument)


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of a file: CSV (a header with `prompt`), JSONL (an object or a string a line), or a prompt a line.

    UTF-8, with or without a byte order mark. In a text file, empty lines and those that begin with # are passed
    over; in CSV, an empty cell leaves its field out.
    """
    readers = {".csv": _csv, ".jsonl": _jsonl}
    reader = readers.get(path.suffix.lower(), _text)
    try:
        with path.open("rb") as stream:
            yield from reader(path, _decoded(path, stream))
    except FileNotFoundError:
        yield Row(str(path), Problem(str(path), "", "there is no such file"))
    except OSError as error:
        yield Row(str(path), Problem(str(path), "", f"can't be read: {error.strerror}"))
    except _NotUtf8 as error:
        yield Row(error.where, Problem(error.where, "", "is not UTF-8; save the file as UTF-8"))


def specs(
    found: Iterable[Row | str | Mapping[str, Any] | RenderSpec],
    defaults: Mapping[str, Any],
    check: Callable[[RenderSpec, str], Problem | None] = lambda _spec, _where: None,
) -> list[RenderSpec]:
    """A spec of each row, with the defaults where the row says nothing.

    `check` is asked about every spec and where it stands, and says what is wrong with it beyond its bounds.
    Raises `InvalidInput` with the problems of all rows.
    """
    made: list[RenderSpec] = []
    problems: list[Problem] = []
    for number, given in enumerate(found, 1):
        row = given if isinstance(given, Row) else Row(f"spec {number}", given)
        if isinstance(row.values, Problem):
            problems.append(row.values)
            continue
        values: Any = {"prompt": row.values} if isinstance(row.values, str) else row.values
        try:
            spec = RenderSpec.parse({**defaults, **values} if isinstance(values, Mapping) else values, where=row.where)
        except InvalidInput as error:
            problems += error.problems
            continue
        made.append(spec)
        problem = check(spec, row.where)
        if problem is not None:
            problems.append(problem)
    if problems:
        raise InvalidInput(problems)
    return made


class _NotUtf8(Exception):
    def __init__(self, where: str) -> None:
        self.where = where


def _decoded(path: Path, stream: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise _NotUtf8(f"{path}:{number}") from None


def _text(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield Row(f"{path}:{number}", prompt)


def _jsonl(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            yield Row(where, Problem(where, "", f"is not JSON: {error}"))
            continue
        if isinstance(values, dict | str):
            yield Row(where, values)
        else:
            yield Row(where, Problem(where, "", "is neither an object nor a string"))


def _csv(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    reader = csv.reader(lines, strict=True)
    began = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        where = f"{path}:1"
        unknown = [name for name in header if name not in RenderSpec.model_fields]
        if "prompt" not in header:
            yield Row(where, Problem(where, "", "the header has no column `prompt`"))
        for name in unknown:
            known = ", ".join(RenderSpec.model_fields)
            yield Row(where, Problem(where, name or "(empty)", f"no such column; known are {known}"))
        if len(set(header)) < len(header):
            yield Row(where, Problem(where, "", "the header names a column twice"))
        if unknown or "prompt" not in header:
            return
        began = reader.line_num + 1
        for cells in reader:
            # A quoted newline makes a row of several lines: its first is where an editor should go.
            where, began = f"{path}:{began}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) > len(header):
                yield Row(where, Problem(where, "", f"has {len(cells)} cells, the header {len(header)}: quote commas"))
                continue
            values = {name: cell for name, cell in zip(header, cells, strict=False) if cell or name == "prompt"}
            yield Row(where, values)
    except csv.Error as error:
        where = f"{path}:{began}"
        yield Row(where, Problem(where, "", f"is not CSV: {error}"))

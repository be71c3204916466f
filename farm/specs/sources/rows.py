"""Rows of prompts from arguments and from text, CSV and JSONL files, with file and line."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from farm.errors import Problem
from farm.specs.spec import RenderSpec

SUFFIXES = (".txt", ".csv", ".jsonl")
_MAX_LINE_BYTES = 1 << 20
_UNDECODED = re.compile("[\udc80-\udcff]")
_NOT_UTF8 = "is not UTF-8; save the file as UTF-8"


@dataclass(frozen=True)
class Row:
    """The content of one line, and its position."""

    where: str
    values: Mapping[str, Any] | str | Problem | RenderSpec
    """The fields of a spec, a prompt, a whole spec, or the problem of the line."""


def is_file(argument: str) -> bool:
    """Whether an argument is a file of prompts rather than a prompt."""
    return argument.endswith(SUFFIXES) or (len(argument) < 256 and "\n" not in argument and Path(argument).is_file())


def rows(arguments: Iterable[str], *, variables: bool = False) -> Iterator[Row]:
    """One row per prompt among the arguments, and the rows of each file; see `file_rows`."""
    for number, argument in enumerate(arguments, 1):
        if is_file(argument):
            yield from file_rows(Path(argument), variables=variables)
        else:
            yield Row(f"prompt {number}", argument)


def file_rows(path: Path, *, variables: bool = False) -> Iterator[Row]:
    """The rows of a file: CSV (a header with `prompt`), JSONL (an object or a string per line), or a prompt per line.

    Files are UTF-8, with or without a byte order mark; lines end in LF or CRLF. In a text file, empty lines and lines
    that begin with # are skipped; in CSV, an empty cell leaves its field out. With `variables`, for a template, CSV may
    have columns of any name and needs no `prompt`. Reads one row at a time; an unreadable line becomes a `Problem`.
    """
    try:
        with path.open("rb") as stream:
            lines = _decoded(path, stream)
            match path.suffix.lower():
                case ".csv":
                    yield from _csv(path, lines, variables)
                case ".jsonl":
                    yield from _jsonl(path, lines)
                case _:
                    yield from _text(path, lines)
    except FileNotFoundError:
        yield _wrong(str(path), "", "there is no such file")
    except OSError as error:
        yield _wrong(str(path), "", f"can't be read: {error.strerror}")
    except _Unreadable as error:
        yield _wrong(error.where, "", str(error))


class _Unreadable(Exception):
    def __init__(self, where: str, message: str) -> None:
        super().__init__(message)
        self.where = where


def _wrong(where: str, field: str, message: str) -> Row:
    return Row(where, Problem(where, field, message))


def _decoded(path: Path, stream: BinaryIO) -> Iterator[str]:
    """The lines; bytes that are not UTF-8 become lone surrogates, so that only their cell is reported."""
    number = 0
    while line := stream.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise _Unreadable(f"{path}:1", "is UTF-16; save the file as UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) > _MAX_LINE_BYTES:
            raise _Unreadable(f"{path}:{number}", "is longer than 1 MiB; is this a file of prompts?")
        yield line.decode("utf-8", "surrogateescape")


def _text(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        where, prompt = f"{path}:{number}", line.strip()
        if not prompt or prompt.startswith("#"):
            continue
        if _UNDECODED.search(prompt):
            yield _wrong(where, "prompt", _NOT_UTF8)
        elif "\r" in prompt:
            yield _wrong(where, "prompt", "has a carriage return inside; let the file's lines end in LF or CRLF")
        else:
            yield Row(where, prompt)


def _jsonl(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        if _UNDECODED.search(line):
            yield _wrong(where, "", _NOT_UTF8)
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield _wrong(where, "", f"is not JSON: {error}")
            continue
        if isinstance(values, str):
            yield Row(where, values)
        elif not isinstance(values, dict):
            yield _wrong(where, "", "is neither an object nor a string")
        elif nested := [name for name, value in values.items() if isinstance(value, dict | list)]:
            for name in nested:
                yield _wrong(where, name, "should be text, a number, true, false or null, not a list or an object")
        else:
            yield Row(where, values)


def _csv(path: Path, lines: Iterator[str], variables: bool) -> Iterator[Row]:
    reader = csv.reader(lines, strict=True)
    began = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        wrong = list(_header_problems(f"{path}:1", header, variables))
        yield from wrong
        if wrong:
            return
        began = reader.line_num + 1
        for cells in reader:
            # A row with quoted newlines has several lines: report the first.
            where, began = f"{path}:{began}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) > len(header):
                yield _wrong(where, "", f"has {len(cells)} cells, the header {len(header)}: quote commas")
                continue
            named = list(zip(header, cells, strict=False))
            undecoded = [name for name, cell in named if _UNDECODED.search(cell)]
            for name in undecoded:
                yield _wrong(where, name, _NOT_UTF8)
            if not undecoded:
                # An empty cell leaves its field out, but a variable may be empty.
                yield Row(
                    where,
                    {
                        name: cell
                        for name, cell in named
                        if cell or name == "prompt" or name not in RenderSpec.model_fields
                    },
                )
    except csv.Error as error:
        yield _wrong(f"{path}:{began}", "", f"is not CSV: {error}")


def _header_problems(where: str, header: list[str], variables: bool) -> Iterator[Row]:
    if any(_UNDECODED.search(name) for name in header):
        yield _wrong(where, "", _NOT_UTF8)
        return
    if not header:
        yield _wrong(where, "", "the header has no column `prompt`" if not variables else "there is no header")
    elif "prompt" not in header and not variables:
        yield _wrong(where, "", "the header has no column `prompt`; `--template` makes prompts of other columns")
    for name in header:
        if not name:
            yield _wrong(where, "(empty)", "a column needs a name")
        elif not variables and name not in RenderSpec.model_fields:
            yield _wrong(where, name, f"no such column; known are {', '.join(RenderSpec.model_fields)}")
    if len(set(header)) < len(header):
        yield _wrong(where, "", "the header names a column twice")

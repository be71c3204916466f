"""Grids: lists of values for fields, `steps=20,30 guidance=5,7.5` and seeds `0..9`, as axes."""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from farm.errors import InvalidInput, Problem
from farm.specs.sources.problems import Problems, parsed
from farm.specs.spec import SHORT_NAMES, RenderSpec, shown

MAX_SPECS = 10_000_000
"""The most pictures of one submission."""
SIZE = "size"
_INTEGERS = {name for name, field in RenderSpec.model_fields.items() if field.annotation in (int, int | None)}
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
_PIXELS = re.compile(r"([0-9]{1,6})[xX]([0-9]{1,6})")
_AXIS = re.compile(r"""\s*([A-Za-z_]\w*)=((?:"(?:[^"]|"")*"|(?!\s+[A-Za-z_]\w*=)[^"])*)""")

Grid = Mapping[str, Any] | Iterable[str] | str
"""Values by axis name, or as text: `"steps=20,30 guidance=5,7.5"`, or several such texts."""


@dataclass(frozen=True)
class Axis:
    """One axis of a grid: the values that a field takes in turn."""

    names: tuple[str, ...]
    """The fields that it sets; two for a size."""
    values: Sequence[Any]
    """The values of one field, or pairs of values of two fields."""

    def fields(self, value: Any) -> dict[str, Any]:
        """One value as a mapping of fields."""
        return dict(zip(self.names, value, strict=True)) if len(self.names) > 1 else {self.names[0]: value}


def is_axis(text: str) -> bool:
    """Whether a text is an axis, such as `steps=20,30`."""
    name, equals, _ = text.partition("=")
    return bool(equals) and (name == SIZE or name in SHORT_NAMES or name in RenderSpec.model_fields)


def combinations(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    """The fields of each combination of a grid, the last axis fastest; without axes, one empty combination."""
    # Not itertools.product, which keeps every seed of a range in memory.
    if not axes:
        yield {}
        return
    for value in axes[0].values:
        for others in combinations(axes[1:]):
            yield axes[0].fields(value) | others


def read_axes(
    grid: Grid | None, seeds: str | Iterable[int] | None, variables: Iterable[str], problems: Problems
) -> tuple[Axis, ...]:
    """The axes in order, seeds last; the template's `variables` may be axes as well.

    An invalid axis is added to the problems and left out.
    """
    axes: list[Axis] = []
    taken: set[str] = set()
    asked = [("grid", name, values) for name, values in _written_axes(grid, problems)]
    if seeds is not None:
        asked.append(("seeds", "seed", seeds))
    for where, called, values in asked:
        name = SHORT_NAMES.get(called, called)
        names = ("width", "height") if name == SIZE else (name,)
        if not set(names) <= RenderSpec.model_fields.keys() | set(variables):
            known = ", ".join([*SHORT_NAMES, SIZE, *RenderSpec.model_fields])
            problems.add(Problem(where, called, f"no such field; known are {known}"))
            continue
        try:
            axis = Axis(names, _values(where, called, name, values))
            _check(where, called, axis)
        except InvalidInput as error:
            problems.add(*error.problems)
            continue
        if taken & set(names):
            problems.add(Problem(where, called, "is varied twice"))
        taken |= set(names)
        axes.append(axis)
    places = 1
    for axis in axes:
        places *= _length(axis.values)
    if places > MAX_SPECS:
        problems.add(Problem("grid", "", f"has {places:,} places; a submission has {MAX_SPECS:,} pictures at most"))
    return tuple(axes)


def _written_axes(grid: Grid | None, problems: Problems) -> Iterator[tuple[str, Any]]:
    if isinstance(grid, Mapping):
        yield from ((str(name), values) for name, values in grid.items())
        return
    for text in [grid] if isinstance(grid, str) else grid or ():
        end = 0
        while text[end:].strip():
            found = _AXIS.match(text, end)
            if found is None:
                problems.add(Problem("grid", "", f"write NAME=VALUE,VALUE…, not {shown(text[end:].strip())}"))
                break
            end = found.end()
            yield found[1], found[2]


def _values(where: str, called: str, name: str, given: Any) -> Sequence[Any]:
    """The values of an axis; raises `InvalidInput`."""
    values: Sequence[Any]
    if isinstance(given, str):
        values = _written_values(where, called, name, given)
    elif isinstance(given, range):
        values = given
    elif isinstance(given, Iterable) and not isinstance(given, bytes | Mapping):
        values = tuple(given)
    else:
        raise InvalidInput([Problem(where, called, f"should be several values, not {shown(given)}")])
    if not values:
        raise InvalidInput([Problem(where, called, "has no values")])
    if name != SIZE:
        return values
    sizes = [_size(value) for value in values]
    wrong = [value for value, size in zip(values, sizes, strict=True) if size is None]
    if wrong:
        raise InvalidInput([Problem(where, called, f"write WIDTHxHEIGHT, not {shown(value)}") for value in wrong])
    return [size for size in sizes if size is not None]


def _written_values(where: str, called: str, name: str, text: str) -> Sequence[Any]:
    try:
        cells = [cell.strip() for cell in next(csv.reader([text], strict=True, skipinitialspace=True), [])]
    except csv.Error as error:
        raise InvalidInput([Problem(where, called, f"{shown(text)} is no list of values: {error}")]) from None
    if "" in cells:
        raise InvalidInput([Problem(where, called, f"has an empty value in {shown(text)}")])
    parts: list[Sequence[Any]] = []
    for cell in cells:
        ends = _RANGE.fullmatch(cell) if name in _INTEGERS else None
        parts.append([cell] if ends is None else range(int(ends[1]), int(ends[2]) + 1))
        if not parts[-1]:
            raise InvalidInput([Problem(where, called, f"{cell} is empty: write the smaller end first")])
    if len(parts) == 1:
        return parts[0]
    if sum(map(len, parts)) > MAX_SPECS:
        raise InvalidInput([Problem(where, called, f"has more than {MAX_SPECS:,} values")])
    return [value for part in parts for value in part]


def _size(value: Any) -> tuple[Any, Any] | None:
    if isinstance(value, str):
        found = _PIXELS.fullmatch(value.strip())
        return (int(found[1]), int(found[2])) if found else None
    return (value[0], value[1]) if isinstance(value, list | tuple) and len(value) == 2 else None


def _check(where: str, called: str, axis: Axis) -> None:
    """Raise `InvalidInput` for values out of bounds, once instead of in every row."""
    if not set(axis.names) <= RenderSpec.model_fields.keys():
        return
    ranged = isinstance(axis.values, range)
    # If both ends of a range of seeds are valid, all seeds between them are.
    values = (axis.values[0], axis.values[-1]) if ranged and axis.names == ("seed",) else axis.values
    found: dict[str, None] = {}
    for value in values:
        try:
            parsed({"prompt": "", **axis.fields(value)}, where)
        except InvalidInput as error:
            found.update(dict.fromkeys(problem.message for problem in error.problems))
            if ranged:  # the first of 1..100000 is enough
                break
    if found:
        raise InvalidInput([Problem(where, called, message) for message in found])


def _length(values: Sequence[Any]) -> int:
    try:
        return len(values)
    except OverflowError:
        return MAX_SPECS + 1

"""Turns rows into specs one by one, and raises all problems at the end."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farm.errors import InvalidInput, Problem
from farm.specs.sources.grid import MAX_SPECS, Axis, Grid, combinations, read_axes
from farm.specs.sources.problems import Problems, parsed
from farm.specs.sources.rows import Row, file_rows
from farm.specs.sources.templates import Template, write
from farm.specs.sources.texts import BadText
from farm.specs.sources.wildcards import Draws, Wildcards
from farm.specs.spec import PROMPT_FIELDS, RenderSpec

Given = Row | str | os.PathLike[str] | Mapping[str, Any] | RenderSpec
"""What can be submitted: a prompt, fields of a spec, a whole spec, a file of those, or a row of a file."""

WILDCARD_FOLDER = Path("wildcards")
"""The default folder of files with choices."""


@dataclass(frozen=True)
class Expansion:
    """Turns one row into several specs; `Expansion()` changes nothing."""

    axes: tuple[Axis, ...] = ()
    template: Template | None = None
    wildcards: Wildcards | None = None
    wildcard_seed: int | None = None
    """The seed of the draws; None means the spec's seed, or 0 if it has none."""

    @classmethod
    def read(
        cls,
        problems: Problems,
        *,
        grid: Grid | None = None,
        seeds: str | Iterable[int] | None = None,
        template: str | None = None,
        wildcards: bool | str | os.PathLike[str] = False,
        wildcard_seed: int | None = None,
    ) -> "Expansion":
        """An expansion from a user's options; invalid parts are added to the problems and left out."""
        folder = WILDCARD_FOLDER if isinstance(wildcards, bool) else Path(wildcards)
        choices = Wildcards(folder) if wildcards is not False else None
        if not isinstance(wildcards, bool) and not folder.is_dir():
            problems.add(Problem("wildcards", "", f"there is no folder {folder}"))
        made = None
        try:
            made = Template(template, choices) if template is not None else None
        except BadText as error:
            problems.add(Problem("template", "", str(error)))
        axes = read_axes(grid, seeds, made.names if made else (), problems)
        return cls(axes, made, choices, wildcard_seed)

    def __bool__(self) -> bool:
        return bool(self.axes or self.template or self.wildcards)

    def fields(
        self, row: Mapping[str, Any], columns: Iterable[str], number: int, where: str
    ) -> tuple[dict[str, Any], list[Problem]]:
        """The fields of a row's spec for one combination of the grid, and its problems.

        `columns` are the row's own columns; a template need not use all of them.
        """
        values = dict(row)
        wrong: list[Problem] = []
        if self.template is not None:
            for name in (*columns, *self.template.names):
                if name not in RenderSpec.model_fields:
                    values.pop(name, None)
        for name in PROMPT_FIELDS:
            draws = self._draws(row, number, name)
            try:
                if self.template is not None and name == "prompt":
                    values[name] = self.template.fill(row, draws)
                elif draws is not None and isinstance(values.get(name), str):
                    values[name] = write(draws.wildcards.parse(values[name]), {}, draws)
            except BadText as error:
                wrong.append(Problem(where, name, str(error)))
                values[name] = ""
        return values, wrong

    def _draws(self, row: Mapping[str, Any], number: int, name: str) -> Draws | None:
        if self.wildcards is None:
            return None
        seed = row.get("seed", 0) if self.wildcard_seed is None else self.wildcard_seed
        return Draws(self.wildcards, f"{seed}/{number}/{name}")


def specs(
    found: Given | Iterable[Given],
    defaults: Mapping[str, Any],
    check: Callable[[RenderSpec, str], Problem | None] = lambda _spec, _where: None,
    *,
    expansion: Expansion = Expansion(),
) -> Iterator[RenderSpec]:
    """A spec for each row and each combination of the grid, rows outermost; defaults fill in what a row leaves out.

    `check` gets every spec and its position, and returns a problem beyond the bounds of its fields. After the first
    problem no further specs are yielded, but all rows are read. At the end `InvalidInput` is raised with all problems;
    the caller must then discard all specs. Keeps one row in memory at a time.
    """
    problems = Problems()
    count = 0
    for number, row in enumerate(_rows(found, variables=expansion.template is not None), 1):
        if isinstance(row.values, Problem):
            problems.add(row.values)
            continue
        for spec in _of_row(row, row.values, number, defaults, check, expansion, problems):
            count += 1
            if count > MAX_SPECS:
                problems.add(Problem(row.where, "", f"a submission has {MAX_SPECS:,} pictures at most"))
                raise problems.error()
            if not problems:
                yield spec
    if not count and not problems:
        problems.add(Problem("", "", "there is nothing to render: no prompts"))
    if problems:
        raise problems.error()


def _rows(found: Given | Iterable[Given], *, variables: bool) -> Iterator[Row]:
    if isinstance(found, Row | str | os.PathLike | Mapping | RenderSpec):
        found = [found]
    for number, given in enumerate(found, 1):
        if isinstance(given, Row):
            yield given
        elif isinstance(given, os.PathLike):
            yield from file_rows(Path(given), variables=variables)
        else:
            yield Row(f"spec {number}", given)


def _of_row(
    row: Row,
    values: Mapping[str, Any] | str | RenderSpec,
    number: int,
    defaults: Mapping[str, Any],
    check: Callable[[RenderSpec, str], Problem | None],
    expansion: Expansion,
    problems: Problems,
) -> Iterator[RenderSpec]:
    """The specs of one row; a problem is added once for all combinations of the grid."""
    said: set[Problem] = set()
    for place in combinations(expansion.axes):
        try:
            fields, wrong = _fields(row, values, place, number, defaults, expansion)
            spec = parsed(fields, row.where)
            wrong += filter(None, [check(spec, row.where)])
        except InvalidInput as error:
            wrong += error.problems
        if not wrong:
            yield spec
            continue
        problems.add(*(problem for problem in wrong if problem not in said))
        said.update(wrong)
        if any(problem.field not in place for problem in wrong):
            return  # the row's own problem, which every combination would repeat


def _fields(
    row: Row, values: Any, place: Mapping[str, Any], number: int, defaults: Mapping[str, Any], expansion: Expansion
) -> tuple[Any, list[Problem]]:
    if isinstance(values, RenderSpec):
        if not expansion:
            return values, []
        own: Mapping[str, Any] = values.model_dump()
    elif isinstance(values, str):
        own = {"prompt": values}
    elif isinstance(values, Mapping):
        # A seed of null counts as left out, so that a default applies.
        own = {name: value for name, value in values.items() if name != "seed" or value is not None}
    else:
        return values, []
    merged = {**defaults, **own, **place}
    if merged.get("seed", 0) is None:
        del merged["seed"]  # counts as left out, so that the submission draws it
    return expansion.fields(merged, own, number, row.where) if expansion else (merged, [])

"""Specs from prompts in arguments, files and Python.

`rows` reads arguments and files; `texts`, `wildcards` and `templates` write prompts; `grid` varies fields; `stream`
yields the specs one by one and raises all errors at the end, with file, line and column.
"""

from farm.specs.sources.grid import Grid, is_axis
from farm.specs.sources.problems import MoreProblems, Problems
from farm.specs.sources.rows import SUFFIXES, Row, file_rows, is_file, rows
from farm.specs.sources.stream import Expansion, Given, specs

__all__ = [
    "SUFFIXES",
    "Expansion",
    "Given",
    "Grid",
    "MoreProblems",
    "Problems",
    "Row",
    "file_rows",
    "is_axis",
    "is_file",
    "rows",
    "specs",
]

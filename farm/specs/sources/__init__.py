"""Prompts from arguments, files and Python, made into specs.

`rows` reads arguments and files; `texts`, `wildcards` and `templates` build prompts; `grid` varies fields; `stream`
turns all of it into specs, one by one, and reports every problem at the end, with file, line and column.
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

"""Fuzzed input of every source gives specs of all rows or a clear error, never a traceback or part of the rows."""

import csv
import io
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.errors import InvalidInput
from farm.specs.sources import Expansion, Problems, specs
from farm.specs.sources.templates import write
from farm.specs.sources.texts import BadText, parse
from farm.specs.sources.wildcards import Draws, Wildcards
from farm.specs.spec import MAX_PROMPT_CHARS, RenderSpec

# Strings with a meaning in some source appear far more often than by chance.
MARKS = [
    *"{}|\\_\"',#\n\r\t ;=[]:",
    *("__a__", "__b__", "__loop__", "\r\n", "\ufeff", "\x00", "\u2028", "é", "\ud800", "{x}", "{a|b}", "..", "true"),
    *("null", "NaN", "1e400", "-1", "64", "prompt", "seed", "x", "steps=1,2", "size=64x64", "9" * 4301, "[" * 1100),
]
texts = st.lists(st.sampled_from(MARKS) | st.text(max_size=3), max_size=12).map("".join)
data = st.binary(max_size=200) | st.tuples(
    st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"prompt,seed,x\n", b'{"prompt": "', b"x\n"]),
    texts.map(lambda text: text.encode("utf-8", "surrogatepass")),
).map(b"".join)
values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | texts
    | st.lists(st.integers(), max_size=2)
    | st.binary(max_size=3)
)
fields = st.dictionaries(st.sampled_from([*RenderSpec.model_fields, "x"]) | texts, values, max_size=5)
options = st.fixed_dictionaries(
    {},
    optional={
        "grid": st.sampled_from(["steps=1,2", "size=64x64 eta=0,1", "x=1,2"]) | texts | fields,
        "seeds": st.sampled_from(["0..2", "5", [1, None]]) | texts | st.lists(values, max_size=3),
        "template": st.sampled_from(["a {x}", "{prompt}", "{{x}|b}"]) | texts,
        "wildcards": st.booleans(),
        "wildcard_seed": st.none() | st.integers(),
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "a.txt").write_text("cat\ndog\n")
    (folder / "b.txt").write_text("{__a__|cow}\n")
    (folder / "loop.txt").write_text("__loop__\n")
    return folder


def outcome(
    folder: Path, found: Any, asked: dict[str, Any]
) -> tuple[Expansion, list[RenderSpec] | InvalidInput] | None:
    """Return the specs or the error that explains why there are none; None if the options are invalid already."""
    problems = Problems()
    if asked.get("wildcards"):
        asked = {**asked, "wildcards": folder}
    expansion = Expansion.read(problems, **asked)
    if problems:
        assert all(problem.message for problem in problems.error().problems)
        return None
    try:
        return expansion, list(specs(found, {}, expansion=expansion))
    except InvalidInput as error:
        result = error
    assert result.problems
    assert all(problem.message for problem in result.problems)
    return expansion, result


def places(expansion: Expansion) -> int:
    return math.prod(len(axis.values) for axis in expansion.axes)


@given(content=data, suffix=st.sampled_from([".txt", ".csv", ".jsonl"]), asked=options)
def test_any_file_is_specs_or_problems_that_name_its_lines(
    folder: Path, content: bytes, suffix: str, asked: dict[str, Any]
) -> None:
    path = folder / f"case{suffix}"
    path.write_bytes(content)
    made = outcome(folder, path, asked)
    if made is None:
        return
    expansion, result = made
    if isinstance(result, InvalidInput):
        lines = content.count(b"\n") + 1
        for problem in result.problems:
            if problem.message != "there is nothing to render: no prompts":
                found = re.fullmatch(re.escape(str(path)) + ":([0-9]+)", problem.where)
                assert found is not None, problem
                assert 1 <= int(found[1]) <= lines
    else:
        assert result
        assert len(result) % places(expansion) == 0
        for spec in result:
            assert RenderSpec.model_validate(json.loads(spec.model_dump_json())) == spec


@given(rows=st.lists(fields | texts | values, max_size=4), asked=options)
def test_any_rows_from_python_are_all_specs_or_problems_that_name_them(
    folder: Path, rows: list[Any], asked: dict[str, Any]
) -> None:
    made = outcome(folder, rows, asked)
    if made is None:
        return
    expansion, result = made
    if isinstance(result, InvalidInput):
        wrong = {problem.where for problem in result.problems}
        assert wrong <= {f"spec {number}" for number in range(1, len(rows) + 1)} | {""}
        assert "" not in wrong or not rows
    else:
        assert len(result) == len(rows) * places(expansion)


@given(rows=st.lists(fields | texts, min_size=1, max_size=4), asked=options)
def test_the_same_submission_makes_the_same_specs(folder: Path, rows: list[Any], asked: dict[str, Any]) -> None:
    once, again = (outcome(folder, rows, asked) for _ in range(2))
    if once is None or again is None:
        assert once is again
        return
    said = [
        str(result) if isinstance(result, InvalidInput) else [spec.model_dump(exclude_unset=True) for spec in result]
        for _, result in (once, again)
    ]
    assert said[0] == said[1]


@given(
    prompts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")), min_size=1),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
)
def test_what_a_spreadsheet_writes_is_read_back_as_it_is(
    folder: Path, prompts: list[str], end: str, mark: bool
) -> None:
    sheet = io.StringIO(newline="")
    table = csv.writer(sheet, lineterminator=end, quoting=csv.QUOTE_ALL)
    table.writerows([["prompt", "seed"], *([prompt, place] for place, prompt in enumerate(prompts))])
    path = folder / "sheet.csv"
    path.write_bytes(sheet.getvalue().encode("utf-8-sig" if mark else "utf-8"))
    assert [(spec.prompt, spec.seed) for spec in specs(path, {})] == [(p, n) for n, p in enumerate(prompts)]
    lines = folder / "lines.jsonl"
    lines.write_text(end.join(json.dumps(prompt) for prompt in prompts), "utf-8", newline="")
    assert [spec.prompt for spec in specs(lines, {})] == prompts


@given(text=texts.filter(lambda text: len(text) < MAX_PROMPT_CHARS))
def test_any_text_escaped_is_itself(folder: Path, text: str) -> None:
    escaped = re.sub(r"[{}|\\_]", r"\\\g<0>", text)
    draws = Draws(Wildcards(folder), "key")
    assert write(parse(escaped, variables=True, choices=True), {}, draws) == text


@given(text=texts, variables=st.booleans(), choices=st.booleans())
def test_any_text_is_read_or_refused(folder: Path, text: str, variables: bool, choices: bool) -> None:
    draws = Draws(Wildcards(folder), "key")
    try:
        written = write(parse(text, variables=variables, choices=choices), defaultdict(lambda: ("value",)), draws)
    except BadText:
        return
    if not variables and not choices and "\\" not in text:
        assert written == text

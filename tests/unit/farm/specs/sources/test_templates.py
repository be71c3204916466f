"""Templates: prompts made from a row's columns, whose text is never interpreted as syntax."""

from pathlib import Path
from typing import Any

import pytest

from farm.errors import InvalidInput
from farm.specs.sources import Expansion, Problems, specs
from farm.specs.spec import RenderSpec


def made(*found: Any, **options: Any) -> list[RenderSpec]:
    problems = Problems()
    names = ("grid", "seeds", "template", "wildcards", "wildcard_seed")
    expansion = Expansion.read(problems, **{name: options.pop(name) for name in names if name in options})
    if problems:
        raise problems.error()
    return list(specs(found, options, expansion=expansion))


def prompts(*found: Any, **options: Any) -> list[str]:
    return [spec.prompt for spec in made(*found, **options)]


def complaints(*found: Any, **options: Any) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        made(*found, **options)
    return [str(problem) for problem in caught.value.problems]


def test_columns_of_a_csv_fill_the_template_and_the_others_stay_fields(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('animal,art style,seed,note\ncat,oil,7,x\n"dog, big",,8,\n')
    first, second = made(path, template="a { animal } in {art style}!", num_inference_steps=9)
    assert (first.prompt, first.seed, first.num_inference_steps) == ("a cat in oil!", 7, 9)
    assert (second.prompt, second.seed) == ("a dog, big in !", 8)


def test_lines_of_jsonl_and_mappings_fill_it_too(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"animal": "cat", "count": 3}\n{"animal": "dog", "count": 2.5, "seed": 1}\n')
    assert prompts(path, {"animal": "cow", "count": True}, template="{count} {animal}") == [
        "3 cat",
        "2.5 dog",
        "True cow",
    ]


def test_prompts_themselves_and_fields_are_variables(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a cat\na dog\n")
    whole = RenderSpec(prompt="whole", seed=7)
    assert prompts(path, "arg", whole, template="{prompt}, {seed}", seed=1) == [
        "a cat, 1",
        "a dog, 1",
        "arg, 1",
        "whole, 7",
    ]


def test_defaults_and_axes_may_be_variables() -> None:
    found = prompts({"animal": "cat"}, template="{style} {animal} {steps}", style="oil", grid={"steps": [1]}, steps=3)
    assert found == ["oil cat 3"]
    assert prompts({"animal": "cat"}, template="{style} {animal}", grid="style=oil,ink") == ["oil cat", "ink cat"]
    assert complaints({"animal": "cat"}, template="{animal}", grid="style=oil,ink")[0].startswith(
        "grid: style: no such"
    )


def test_a_misspelt_default_is_no_variable() -> None:
    assert complaints({"animal": "cat"}, template="{animal}", num_steps=3)[0].startswith("spec 1: num_steps: no such")


@pytest.mark.parametrize(
    "name", ["x.__class__", "x[0]", "x!r", "x:>9999999", "0", "", "x.__init__.__globals__", "seed.real"]
)
def test_a_variable_is_a_columns_name_and_never_an_expression(name: str) -> None:
    (said,) = complaints({"x": "a"}, template=f"a {{{name}}}")
    assert said == f"spec 1: prompt: the template's {{{name}}} has no value here; there are: x"
    assert prompts({"x": "a", name: "b"}, template=f"a {{{name}}}") == ["a b"]


def test_what_a_column_says_is_never_read_as_a_template() -> None:
    assert prompts({"x": "{y} {a|b} __c__ \\{", "y": "no"}, template="a {x}") == ["a {y} {a|b} __c__ \\{"]


def test_choices_stay_unless_they_are_asked_for() -> None:
    assert prompts({"x": "1"}, template=r"{a|{x}} \{x\} __x__") == ["{a|1} {x} __x__"]


def test_with_wildcards_templates_and_columns_draw_each_by_itself() -> None:
    rows = [{"x": "{p|q}", "y": "s|t"}] * 200
    assert set(prompts(*rows, template="{{x}|{y}}", wildcards=True)) == {"p", "q", "s|t"}
    # A column's brace can't close a brace of the template.
    assert "nothing opens" in complaints({"x": "}"}, template="{a|{x}}", wildcards=True)[0]
    assert prompts({"x": "{y}", "y": "no"}, template="{x}", wildcards=True) == ["{y}"]


def test_each_row_that_lacks_a_variable_is_told_with_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"animal": "cat"}\n{"animal": null}\n{"animal": "dog", "style": "oil"}\n"text"\n{"style": []}\n')
    assert [line.removeprefix(f"{tmp_path}/") for line in complaints(path, template="{animal} {style}")] == [
        "p.jsonl:1: prompt: the template's {style} has no value here; there are: animal",
        "p.jsonl:2: prompt: the template's {animal} has no value here; there are: none",
        "p.jsonl:4: prompt: the template's {animal} has no value here; there are: prompt",
        "p.jsonl:5: style: should be text, a number, true, false or null, not a list or an object",
    ]
    assert "not list" in complaints({"animal": ["x"]}, template="{animal}")[0]


@pytest.mark.parametrize("template", ["a {", "a }", "{" * 30])
def test_a_template_that_can_not_be_read_is_told_once(template: str) -> None:
    (said,) = complaints(*[{"x": 1}] * 9, template=template)
    assert said.startswith("template: has ")


def test_a_header_of_any_columns_needs_a_template(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("animal,style\ncat,oil\n")
    assert any("the header has no column `prompt`; `--template`" in line for line in complaints(path))
    path.write_text("animal,,animal\ncat,oil,x\n")
    assert [line.split("p.csv:")[1] for line in complaints(path, template="{animal}")] == [
        "1: (empty): a column needs a name",
        "1: the header names a column twice",
    ]

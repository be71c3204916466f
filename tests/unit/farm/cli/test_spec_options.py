"""The options, columns and axes of a spec are all derived from the fields of `RenderSpec`."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import farm
from farm.cli.spec_options import with_spec_options
from farm.specs.spec import SHORT_NAMES, RenderSpec

Parse = Callable[..., dict[str, Any]]


@pytest.fixture
def parse() -> Parse:
    given: dict[str, Any] = {}
    app = typer.Typer()

    @app.command()
    @with_spec_options
    def command(what: str, **fields: Any) -> None:
        given.update(fields, what=what)

    def parsed(*arguments: str) -> dict[str, Any]:
        result = CliRunner().invoke(app, ["a prompt", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return given

    return parsed


def test_options_that_are_not_given_set_no_field(parse: Parse) -> None:
    assert parse() == {"what": "a prompt"}


def test_an_option_has_the_type_of_its_field(parse: Parse) -> None:
    given = parse(
        *("--width", "512", "--eta", "0.5", "--negative-prompt", "", "--clip-skip", "2"),
        *("--model", "sd15", "--deterministic", "--trajectory"),
    )
    assert given == {
        "what": "a prompt",
        "width": 512,
        "eta": 0.5,
        "negative_prompt": "",
        "clip_skip": 2,
        "model": "sd15",
        "deterministic": True,
        "trajectory": True,
    }


def test_short_names_are_options_too(parse: Parse) -> None:
    given = parse("--steps", "30", "--guidance", "7.5", "--sampler", "euler_a", "--negative", "blur")
    assert given == {
        "what": "a prompt",
        "num_inference_steps": 30,
        "guidance_scale": 7.5,
        "scheduler": "euler_a",
        "negative_prompt": "blur",
    }


def test_no_two_names_of_fields_are_the_same() -> None:
    assert len(SHORT_NAMES) == 4
    assert not SHORT_NAMES.keys() & RenderSpec.model_fields.keys()


def test_the_json_schema_describes_every_field() -> None:
    properties = RenderSpec.model_json_schema()["properties"]
    assert properties.keys() == RenderSpec.model_fields.keys()
    assert [name for name, schema in properties.items() if not schema.get("description")] == []


@pytest.fixture
def next_release(tmp_path: Path) -> Path:
    """A copy of the farm whose spec has three more fields."""
    root = tmp_path / "next"
    shutil.copytree(Path(farm.__file__).parent, root / "farm")
    spec = root / "farm" / "specs" / "spec.py"
    line = '    prompt: Prompt\n    """What to render."""\n'
    more = (
        '    hue: Annotated[int, ShortName("tint")] = Field(default=3, ge=0, le=360)\n    """The colour."""\n'
        '    words: Prompt = ""\n    """More words."""\n'
        '    upside: bool = True\n    """Which side is up."""\n'
    )
    text = spec.read_text()
    assert line in text
    spec.write_text(text.replace(line, line + more))
    return root


def test_a_new_field_of_the_spec_needs_no_other_edit(next_release: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,hue\na,7\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "b", "hue": 8}\n')
    program = (
        "from farm.cli.main import app\n"
        "from farm.specs.sources import Expansion, Problems, is_axis, rows, specs\n"
        "from typer.testing import CliRunner\n"
        "print(CliRunner().invoke(app, ['submit', '--help']).output)\n"
        "assert is_axis('hue=1..3') and is_axis('tint=1')\n"
        "found = [spec.hue for spec in specs(rows(['rows.csv', 'rows.jsonl', 'c']), {'hue': 9})]\n"
        "assert found == [7, 8, 9], found\n"
        "grid = Expansion.read(Problems(), grid='tint=1..3', wildcards=True)\n"
        "found = [(spec.hue, spec.words) for spec in specs(['a'], {'words': '{x|x}'}, expansion=grid)]\n"
        "assert found == [(1, 'x'), (2, 'x'), (3, 'x')], found\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(next_release), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "--hue,--tint",
        "The colour.",
        "--words",
        "More words.",
        "--upside",
        "--no-upside",
        "Which side is up",
    ):
        assert words in done.stdout

"""The help of the command line, and of the other programs."""

import ast
from collections.abc import Iterator
from pathlib import Path

import typer
from typer.core import TyperCommand, TyperGroup
from typer.testing import CliRunner

from farm.cli.main import app
from workers.__main__ import parser

ROOT = Path(__file__).parents[4]


def commands(command: object, name: str = "farm") -> Iterator[tuple[str, TyperCommand | TyperGroup]]:
    """A command and all commands below it, with the words that call it."""
    assert isinstance(command, TyperCommand | TyperGroup)
    yield name, command
    if isinstance(command, TyperGroup):
        for word, child in command.commands.items():
            yield from commands(child, f"{name} {word}")


def programs_options() -> Iterator[tuple[str, str]]:
    """The place of each `add_argument` in the tree, with its help text; a value in that text reads `0`."""
    for folder in ("farm", "workers", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for call in ast.walk(ast.parse(path.read_text())):
                if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument":
                    text = next((one.value for one in call.keywords if one.arg == "help"), ast.Constant(""))
                    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                    said = "".join(str(part.value) if isinstance(part, ast.Constant) else "0" for part in parts)
                    yield f"{path.relative_to(ROOT)}:{call.lineno}", said


def is_sentence(text: str) -> bool:
    return text[:1].isupper() and text.rstrip().endswith(".")


def test_every_command_option_and_argument_has_a_help_text() -> None:
    found = dict(commands(typer.main.get_command(app)))
    assert {"farm submit", "farm models push", "farm doctor"} <= found.keys()
    without = [name for name, command in found.items() if not command.help]
    for name, command in found.items():
        without += [f"{name} {each.name}" for each in command.params if not getattr(each, "help", None)]
    assert without == []


def test_a_help_text_is_a_sentence() -> None:
    found = dict(commands(typer.main.get_command(app)))
    texts = [command.help or "" for command in found.values()]
    texts += [each.help or "" for command in found.values() for each in command.params]  # type: ignore[attr-defined]
    assert [text for text in texts if not is_sentence(text)] == []


def test_every_option_of_the_worker_has_a_help_text() -> None:
    texts = {action.dest: action.help or "" for action in parser()._actions if action.dest != "help"}
    assert {"models", "gpus", "slots"} <= texts.keys()
    assert {name: text for name, text in texts.items() if not is_sentence(text)} == {}


def test_every_option_of_the_other_programs_has_a_help_text() -> None:
    found = dict(programs_options())
    assert {"workers/__main__.py", "benchmarks/queue.py", "examples/demo.py"} <= {at.split(":")[0] for at in found}
    assert {at: text for at, text in found.items() if not is_sentence(text)} == {}


def test_help_is_printed_for_every_command() -> None:
    for name, _ in commands(typer.main.get_command(app)):
        if name != "farm worker":  # its help is the worker's own
            words = name.split()[1:]
            assert CliRunner().invoke(app, [*words, "--help"], catch_exceptions=False).exit_code == 0, name

"""The help of the command line."""

from collections.abc import Iterator

import typer
from typer.core import TyperCommand, TyperGroup
from typer.testing import CliRunner

from farm.cli.main import app


def commands(command: object, name: str = "farm") -> Iterator[tuple[str, TyperCommand | TyperGroup]]:
    """A command and all commands below it, with the words that call it."""
    assert isinstance(command, TyperCommand | TyperGroup)
    yield name, command
    if isinstance(command, TyperGroup):
        for word, child in command.commands.items():
            yield from commands(child, f"{name} {word}")


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
    assert [text for text in texts if not text[0].isupper() or not text.rstrip().endswith(".")] == []


def test_help_is_printed_for_every_command() -> None:
    for name, _ in commands(typer.main.get_command(app)):
        if name != "farm worker":  # its help is the worker's own
            words = name.split()[1:]
            assert CliRunner().invoke(app, [*words, "--help"], catch_exceptions=False).exit_code == 0, name

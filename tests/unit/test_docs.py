"""The documentation names only pages, files, tests, commands and options that exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from farm.cli.main import app
from farm.settings import Settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

_LINK = re.compile(r"\]\((?!\w+:)(?P<path>[^)#]*)(?:#(?P<anchor>[^)]*))?\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_FILE = re.compile(r"`((?:farm|workers|tests|infra|docs|examples)/[\w./-]*[\w/])(?:::(\w+))?`")
_INLINE = re.compile(r"`(farm [^`\n]+)`")
_SHELL = re.compile(r"^```sh[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^ {4}(.*)$", re.MULTILINE)
_TYPED = re.compile(r"(?:^|\s|/)(farm [a-z].*)")
_VARIABLE = re.compile(r"\bFARM_[A-Z0-9_]+\b")
_NO_SETTINGS = {"FARM_ENV_FILE", "FARM_S3_"}
_EXAMPLES = {"workers/pipelines/pixart_sigma.py"}
"""Files that the examples of a page create."""
_OTHER_PARSER = "worker"
"""The command whose options `workers` parses."""


@ALL_PAGES
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in _LINK.finditer(page.read_text()):
        target = (page.parent / link["path"]).resolve() if link["path"] else page
        assert target.is_relative_to(ROOT), link[0]
        assert target.exists(), link[0]
        if link["anchor"]:
            assert link["anchor"] in map(_anchor, _HEADING.findall(target.read_text())), link[0]


@ALL_PAGES
def test_every_named_file_and_test_exists(page: Path) -> None:
    for path, test in _FILE.findall(page.read_text()):
        file = ROOT / path
        assert file.exists() or path in _EXAMPLES, path
        assert not test or f"def {test}(" in file.read_text(), f"{path}::{test}"


@ALL_PAGES
def test_every_named_command_and_option_exists(page: Path) -> None:
    for line in _commands(page.read_text()):
        command, words = get_command(app), shlex.split(line)[1:]
        while words and not words[0].startswith("-") and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert command.name != "farm", f"no such command: {line}"
        if command.name != _OTHER_PARSER:
            known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
            given = {word.partition("=")[0] for word in words if word.startswith("-")}
            assert given <= known | {"--help"}, line


@ALL_PAGES
def test_every_named_setting_exists(page: Path) -> None:
    known = {f"FARM_{name.upper()}" for name in Settings.model_fields} | _NO_SETTINGS
    assert set(_VARIABLE.findall(page.read_text())) <= known


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [page.name for page in PAGES[1:] if page.name != "README.md" and f"({page.name})" not in index]
    assert not missing


def _commands(text: str) -> Iterator[str]:
    yield from _INLINE.findall(text)
    for line in (*"".join(_SHELL.findall(text)).splitlines(), *_INDENTED.findall(text)):
        if typed := _TYPED.search(line.partition("#")[0]):
            yield typed[1].strip()


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")

r"""Parses a text with variables and choices into a tree: `a {red|blue} {animal} in __place__`.

    {red|blue}    a choice; options may be empty or nested
    __place__     a line of the file place.txt
    {animal}      a variable
    \{ \| \} \_ \\  the character itself

Any other `{…}` stays as it is.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

MAX_DEPTH = 20
"""How deep braces may be nested."""
_WORD = r"(?:[^\W_]|-)+"
_TOKEN = re.compile(r"\\[{}|\\_]|[{}|]|__(" + _WORD + "(?:[_/]" + _WORD + r")*)__")


class BadText(Exception):
    """Raised for a text that cannot be parsed or expanded; says why."""


@dataclass(frozen=True, slots=True)
class Variable:
    """A placeholder for the row's value of that name."""

    name: str


@dataclass(frozen=True, slots=True)
class Choice:
    """A placeholder for one of its options."""

    options: "tuple[Nodes, ...]"


@dataclass(frozen=True, slots=True)
class Pick:
    """A placeholder for one line of the file of that name."""

    name: str


Node = str | Variable | Choice | Pick
Nodes = tuple[Node, ...]


@dataclass
class _Group:
    at: int
    options: list[list[Node]] = field(default_factory=lambda: [[]])


@lru_cache(maxsize=256)
def parse(text: str, *, variables: bool, choices: bool) -> Nodes:
    """The tree of a text; variables or choices that are not enabled stay text. Raises `BadText`."""
    open_groups = [_Group(0)]
    end = 0
    for token in _TOKEN.finditer(text):
        nodes = open_groups[-1].options[-1]
        if token.start() > end:
            nodes.append(text[end : token.start()])
        end = token.end()
        match token[0]:
            case "{":
                if len(open_groups) > MAX_DEPTH:
                    raise BadText(f"has braces deeper than {MAX_DEPTH} at character {end}")
                open_groups.append(_Group(end))
            case "|" if len(open_groups) > 1:
                open_groups[-1].options.append([])
            case "}":
                if len(open_groups) == 1:
                    raise BadText(f"has a }} at character {end} that nothing opens; write \\}} for the character")
                group = open_groups.pop()
                open_groups[-1].options[-1] += _closed(group, variables, choices)
            case found if token[1]:
                nodes.append(Pick(token[1]) if choices else found)
            case found:
                nodes.append(found.removeprefix("\\") if len(found) > 1 else found)
    if len(open_groups) > 1:
        raise BadText(f"has a {{ at character {open_groups[-1].at} that nothing closes; write \\{{ for the character")
    return (*open_groups[0].options[0], *([text[end:]] if end < len(text) else []))


def _closed(group: _Group, variables: bool, choices: bool) -> list[Node]:
    if len(group.options) > 1 and choices:
        return [Choice(tuple(map(tuple, group.options)))]
    first, *others = group.options
    if variables and not others and all(isinstance(node, str) for node in first):
        return [Variable("".join(map(str, first)).strip())]
    nodes: list[Node] = ["{", *first]
    for option in others:
        nodes += ["|", *option]
    return [*nodes, "}"]


def walk(nodes: Nodes) -> Iterator[Node]:
    """Every node, including those in options."""
    for node in nodes:
        yield node
        if isinstance(node, Choice):
            for option in node.options:
                yield from walk(option)

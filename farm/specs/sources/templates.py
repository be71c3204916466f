"""Prompts from a template and a row's columns: `a {animal} in {style}`.

A `{name}` is only looked up among the columns. Templates and columns are data and never evaluated.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from farm.specs.sources.texts import BadText, Choice, Nodes, Pick, Variable, parse, walk
from farm.specs.sources.wildcards import Draws, Wildcards
from farm.specs.spec import MAX_PROMPT_CHARS


class Template:
    """A prompt with `{name}` placeholders, and with choices if there are wildcards. Raises `BadText`."""

    def __init__(self, text: str, wildcards: Wildcards | None = None) -> None:
        if wildcards is None:
            self._nodes = parse(text, variables=True, choices=False)
        else:
            self._nodes = wildcards.parse(text, variables=True)
        self.names = tuple(dict.fromkeys(node.name for node in walk(self._nodes) if isinstance(node, Variable)))
        """The names of its variables, in order."""

    def fill(self, values: Mapping[str, Any], draws: Draws | None = None) -> str:
        """The prompt of a row; raises `BadText` if the row lacks a variable.

        With `draws`, choices in the row's values are drawn as well, each value by itself.
        """
        filled = {name: self._value(name, values) for name in self.names}
        if draws is None:
            return write(self._nodes, {name: (text,) for name, text in filled.items()})
        return write(self._nodes, {name: draws.wildcards.parse(text) for name, text in filled.items()}, draws)

    @staticmethod
    def _value(name: str, values: Mapping[str, Any]) -> str:
        value = values.get(name)
        if value is None:
            there = ", ".join(str(name) for name in values if values[name] is not None)
            raise BadText(f"the template's {{{name}}} has no value here; there are: {there or 'none'}")
        if not isinstance(value, str | int | float):
            raise BadText(f"the template's {{{name}}} should be text or a number here, not {type(value).__name__}")
        return str(value)


def write(nodes: Nodes, values: Mapping[str, Nodes], draws: Draws | None = None) -> str:
    """The text of a tree with its variables and choices filled in; raises `BadText` if it becomes too long."""
    written: list[str] = []
    length = 0
    for part in _parts(nodes, values, draws):
        length += len(part)
        if length > MAX_PROMPT_CHARS:
            raise BadText(f"is longer than {MAX_PROMPT_CHARS} characters when it is written out")
        written.append(part)
    return "".join(written)


def _parts(nodes: Nodes, values: Mapping[str, Nodes], draws: Draws | None) -> Iterator[str]:
    for node in nodes:
        match node:
            case str():
                yield node
            case Variable(name):
                yield from _parts(values[name], values, draws)
            case Choice(options) if draws is not None:
                yield from _parts(draws.one(options), values, draws)
            case Pick(name) if draws is not None:
                yield from _parts(draws.one(draws.wildcards.choices(name)), values, draws)

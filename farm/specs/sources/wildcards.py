"""Choices in prompts: `{red|blue}`, and `__animal__` for a line of animal.txt, drawn from a seed."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from random import Random

from farm.specs.sources.texts import BadText, Nodes, Pick, parse, walk

_MAX_FILES_DEEP = 10
_MAX_DRAWS = 10_000
_SHOWN = 20


class Wildcards:
    """A folder of text files with one choice per line; empty lines and lines that begin with # are skipped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, Sequence[Nodes] | BadText] = {}
        self._reading: list[str] = []
        self._there: str | None = None

    def parse(self, text: str, *, variables: bool = False) -> Nodes:
        """The tree of a text; raises `BadText`, also if a file that it names is missing."""
        nodes = parse(text, variables=variables, choices=True)
        for node in walk(nodes):
            if isinstance(node, Pick):
                self.choices(node.name)
        return nodes

    def choices(self, name: str) -> Sequence[Nodes]:
        """The parsed lines of a file, which may contain choices themselves; raises `BadText`."""
        found = self._read.get(name)
        if found is None:
            path = self.folder / f"{name}.txt"
            if not path.is_file():
                raise BadText(f"there is no {path} for __{name}__; {self._what_is_there()}")
            if name in self._reading:
                raise BadText(f"wildcard files include each other: {' → '.join([*self._reading, name])}")
            if len(self._reading) >= _MAX_FILES_DEEP:
                raise BadText(f"wildcard files are nested more than {_MAX_FILES_DEEP} deep, down to {path}")
            self._reading.append(name)
            try:
                found = self._lines(path)
            except BadText as error:
                if len(self._reading) > 1:  # the fault may be in the file that led here
                    raise
                found = error
            finally:
                self._reading.pop()
            self._read[name] = found
        if isinstance(found, BadText):
            raise found
        return found

    def _lines(self, path: Path) -> Sequence[Nodes]:
        try:
            lines = path.read_text("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise BadText(f"{path} is not UTF-8; save the file as UTF-8") from None
        except OSError as error:
            raise BadText(f"{path} can't be read: {error.strerror}") from None
        found = []
        for number, line in enumerate(lines, 1):
            choice = line.strip()
            if choice and not choice.startswith("#"):
                try:
                    found.append(self.parse(choice))
                except BadText as error:
                    raise BadText(f"{path}:{number}: {error}") from None
        if not found:
            raise BadText(f"{path} has no choices in it")
        return found

    def _what_is_there(self) -> str:
        if self._there is None:
            paths = self.folder.rglob("*.txt") if self.folder.is_dir() else iter(())
            found = [path.relative_to(self.folder).with_suffix("").as_posix() for path in islice(paths, _SHOWN + 1)]
            names = ", ".join(sorted(found)[:_SHOWN]) + ", …" * (len(found) > _SHOWN)
            self._there = f"the folder has {names or 'no .txt files'}" if self.folder.is_dir() else "nor such a folder"
        return self._there


class Draws:
    """Draws the choices of one text; the same key draws the same choices."""

    def __init__(self, wildcards: Wildcards, key: str) -> None:
        self.wildcards = wildcards
        # Not `choice`: one `random()` per draw, so that another option in one place does not change the other places.
        self._random = Random(key)  # noqa: S311
        self._left = _MAX_DRAWS

    def one(self, options: Sequence[Nodes]) -> Nodes:
        """One of the options; raises `BadText` after too many draws."""
        self._left -= 1
        if self._left < 0:
            raise BadText(f"draws more than {_MAX_DRAWS:,} choices")
        return options[int(self._random.random() * len(options))]

"""The options that describe a picture, generated from the fields of `RenderSpec`."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from farm.specs.spec import RenderSpec, ShortName

_PANEL = "What to render"


def with_spec_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's `**fields` with an option for each field of a spec that has a default.

    The command receives only the fields whose options were given. Typer parses text, numbers and flags; a field of any
    other type is passed as text, which the spec parses like a cell of a CSV file.
    """
    own = [
        parameter
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    options = list(_options())

    @functools.wraps(command)
    def given(**arguments: Any) -> None:
        unset = {option.name for option in options if arguments[option.name] is None}
        command(**{name: value for name, value in arguments.items() if name not in unset})

    given.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    return given


def _options() -> Iterator[inspect.Parameter]:
    for name, field in RenderSpec.model_fields.items():
        if not field.is_required():
            option = typer.Option(
                *_names(name, field), help=field.description, show_default=_default(field), rich_help_panel=_PANEL
            )
            annotation = Annotated[_type(field) | None, option]  # type: ignore[valid-type]
            yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _names(name: str, field: FieldInfo) -> Iterator[str]:
    for each in (name, *(short.name for short in field.metadata if isinstance(short, ShortName))):
        option = f"--{each.replace('_', '-')}"
        yield f"{option}/--no-{option[2:]}" if field.default is True else option


def _default(field: FieldInfo) -> str | bool:
    """The default in the help text; False hides an uninformative default."""
    silent = field.default_factory is not None or field.default in (None, "") or isinstance(field.default, bool)
    return False if silent else str(field.default)


def _type(field: FieldInfo) -> type:
    return next((kind for kind in (bool, int, float) if field.annotation in (kind, kind | None)), str)

"""`python -m farm.settings` prints docs/settings.md."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from farm.settings.fields import Settings
from farm.settings.sources import Places, variable

_SECTIONS = {"home": "Services", "owner": "Batches, jobs and monitoring", "models": "Workers"}
"""The headings, by the first setting under each."""

_HEAD = """\
# Settings

Every setting is an environment variable; upper and lower case are the same, and the value `none` means no value.
Sizes have units, such as `20GiB`. `farm env` prints the settings with which other machines join a farm.

Values come from the environment, and then from the file that `FARM_ENV_FILE` names. Without such a file and without
variables that name services, the services are those of the embedded farm in `FARM_HOME`. `FARM_DATABASE_URL`,
`FARM_BROKER_URL` and `FARM_S3_BUCKET` belong together: set all three or none.

This page is printed by `python -m farm.settings`."""


def page() -> str:
    """docs/settings.md, in Markdown."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _HEAD
    settings = Settings.model_fields
    for name, field in {"home": settings["home"], **_only_places(), **settings}.items():
        if name in _SECTIONS:
            yield f"\n## {_SECTIONS[name]}\n\n| variable | default | meaning |\n|---|---|---|"
        yield f"| `{variable(name)}` | {_default(field)} | {field.description} |"


def _only_places() -> dict[str, FieldInfo]:
    return {name: field for name, field in Places.model_fields.items() if name not in Settings.model_fields}


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value: Any = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Path):
        value = f"~/{value.relative_to(Path.home())}" if value.is_relative_to(Path.home()) else value
    elif field.default_factory is not None:
        return ""  # it depends on the machine, and the docstring describes it
    match value:
        case None:
            return "`none`"
        case bool():
            return f"`{str(value).lower()}`"
        case float():
            return f"`{value:g}`"
        case _:
            return f"`{value}`"


if __name__ == "__main__":
    print(page(), end="")

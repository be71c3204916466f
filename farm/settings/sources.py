"""The sources of `Settings`: the environment, the file that it names, or the embedded farm."""

import os
import stat
from pathlib import Path

from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    JsonConfigSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from farm.errors import NotConfigured

PREFIX = "FARM_"
EMBEDDED_FILE = "farm.json"
"""Written by `farm up` in its home, mode 0600: the addresses and credentials of its parts."""
SERVICES = ("database_url", "broker_url", "s3_bucket")
"""The settings without a default: a farm is named by all of them."""
_NAMING = (*SERVICES, "s3_endpoint_url", "s3_access_key_id", "s3_secret_access_key")
"""The settings that lead away from the embedded farm. The URL of Flower is not among them: no job passes through it."""


class Places(BaseSettings):
    """The settings that locate the other settings."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, use_attribute_docstrings=True)

    home: Path = Path(".farm")
    env_file: Path | None = None
    """A file of settings, as `farm env --out FILE` writes it."""


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"{PREFIX}{name.upper()}"


def embedded_home() -> Path:
    """The folder of the embedded farm."""
    return Places().home


def env_file() -> Path | None:
    """The file of settings that `FARM_ENV_FILE` names."""
    return Places().env_file


def variables_naming_a_farm() -> list[str]:
    """The variables in the environment that name a farm, with their spelling there; case does not matter.

    If any is set, the embedded farm is not used: a mix of two farms would put jobs of the first into the queue of the
    second.
    """
    naming = {variable(name) for name in (*_NAMING, "env_file")}
    return sorted(name for name in os.environ if name.upper() in naming)


def uses_embedded_farm() -> bool:
    """Whether the services are those of the embedded farm, because the environment names no farm."""
    return not variables_naming_a_farm()


def child_environment(home: Path) -> dict[str, str]:
    """The environment for a child process that uses the embedded farm in `home`, regardless of this process's farm.

    The names of settings are in upper case, so that a value set for the child replaces every spelling.
    """
    naming = variables_naming_a_farm()
    kept = {name: value for name, value in os.environ.items() if name not in naming}
    upper = {name.upper() if name.upper().startswith(PREFIX) else name: value for name, value in kept.items()}
    return upper | {variable("home"): str(home)}


def sources(
    settings: type[BaseSettings], arguments: PydanticBaseSettingsSource, environment: PydanticBaseSettingsSource
) -> tuple[PydanticBaseSettingsSource, ...]:
    """The active sources, in order of precedence; raises `NotConfigured`.

    Arguments, then the environment, then the file that `FARM_ENV_FILE` names, or the embedded farm's file.
    """
    given = arguments()
    if given.keys() & _NAMING:
        return arguments, environment
    places = Places()
    if places.env_file is not None:
        return arguments, environment, _env_file(settings, places.env_file.expanduser(), environment)
    if not uses_embedded_farm():
        return arguments, environment
    file = Path(given.get("home", places.home)) / EMBEDDED_FILE
    return arguments, environment, JsonConfigSettingsSource(settings, json_file=file)


def _env_file(
    settings: type[BaseSettings], path: Path, environment: PydanticBaseSettingsSource
) -> DotEnvSettingsSource:
    """A file written by `farm env`.

    Raises `NotConfigured` if it can't be read, if every user of the machine can read it, or if it and the environment
    name different farms.
    """
    try:
        if path.stat().st_mode & stat.S_IRWXO:
            raise NotConfigured(f"{path} holds passwords, and everybody on this machine can read it: chmod 600 {path}")
        source = DotEnvSettingsSource(settings, env_file=path)
    except OSError as error:
        raise NotConfigured(f"FARM_ENV_FILE can't be read: {error.strerror}: {path}") from error
    except ValueError as error:
        raise NotConfigured(f"FARM_ENV_FILE: {path} is not a file of variables: {error}") from error
    in_file, in_environment = source(), environment()
    if not in_file.keys() & SERVICES:
        raise NotConfigured(f"FARM_ENV_FILE: {path} names no farm; `farm env --out FILE` writes such a file")
    both = [name for name in SERVICES if name in in_environment and in_environment[name] != in_file.get(name)]
    if both:
        raise NotConfigured(
            f"{', '.join(map(variable, both))}: the environment differs from {path}, which FARM_ENV_FILE names: "
            "unset one of the two"
        )
    return source

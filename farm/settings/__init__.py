"""The settings of the farm: `Settings`, and the sources of its values."""

from farm.settings.fields import Settings
from farm.settings.sources import (
    EMBEDDED_FILE,
    child_environment,
    embedded_home,
    env_file,
    uses_embedded_farm,
    variable,
    variables_naming_a_farm,
)

__all__ = [
    "EMBEDDED_FILE",
    "Settings",
    "child_environment",
    "embedded_home",
    "env_file",
    "uses_embedded_farm",
    "variable",
    "variables_naming_a_farm",
]

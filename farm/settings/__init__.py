"""Where the farm's services are and how it behaves: `Settings`, and where its values come from."""

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

"""The settings for other processes of the farm, as variables in a file or for a shell."""

import ipaddress
import re
import shlex
from collections.abc import Iterator
from urllib.parse import urlsplit

from pydantic import SecretStr

from farm.errors import NotConfigured
from farm.jobs.database import database_url
from farm.settings import Settings, variable

SHARED = (
    "database_url",
    "broker_url",
    "s3_bucket",
    "s3_endpoint_url",
    "s3_public_endpoint_url",
    "s3_access_key_id",
    "s3_secret_access_key",
    "s3_region",
    "flower_url",
    "window",
    "most_queued",
    "starvation_seconds",
    "lease_seconds",
    "beat_seconds",
    "max_tries",
    "retry_seconds",
    "retry_max_seconds",
    "max_lost_leases",
)
"""The settings that are the same in all processes of a farm; the others are per process."""
_BARE = re.compile(r"[\w@%+=:,./?\[\]-]*", re.ASCII)


def variables(settings: Settings) -> dict[str, str]:
    """The variables of all shared settings that were set; the others have the same default everywhere."""
    found = {}
    for name in SHARED:
        if name in settings.model_fields_set:
            value = getattr(settings, name)
            text = value.get_secret_value() if isinstance(value, SecretStr) else value
            found[variable(name)] = "none" if text is None else str(text)
    return found


def as_file(values: dict[str, str]) -> str:
    """A file that dotenv readers, systemd's `EnvironmentFile=`, `docker --env-file` and shells read in the same way.

    A value is quoted only if necessary, because Docker takes quotes literally and does not support such values. Raises
    `NotConfigured` for a value that not every reader understands.
    """
    return "".join(f"{name}={_written(name, value)}\n" for name, value in values.items())


def as_shell(values: dict[str, str]) -> str:
    """Commands for `eval` in a shell."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())


def reach(settings: Settings) -> Iterator[str]:
    """Yield the reasons why other machines cannot join this farm, each with its remedy."""
    database = database_url(settings.database_url)
    if database.get_backend_name() == "sqlite":
        yield (
            f"SQLite is a file of this machine ({database.database}): other machines can't work with it. For several, "
            "run the farm with PostgreSQL: docker-compose.yml does, or set FARM_DATABASE_URL, FARM_BROKER_URL and "
            "FARM_S3_* to services of your own and start `farm migrate` and `farm dispatcher`"
        )
    addresses = {
        "FARM_DATABASE_URL": database.host,
        "FARM_BROKER_URL": urlsplit(settings.broker_url).hostname,
        "FARM_S3_ENDPOINT_URL": urlsplit(settings.s3_endpoint_url or "").hostname,
    }
    here = [name for name, host in addresses.items() if _loopback(host)]
    if here:
        yield (
            f"{', '.join(here)} lead{'s' * (len(here) == 1)} to this machine's loopback address, which other machines "
            "can't reach: for them, let the services listen on an address of a network of yours and name that"
        )
    if settings.s3_access_key_id is None:
        yield "the settings contain no S3 keys: each machine needs its own AWS credentials, or a role"


def _loopback(host: str | None) -> bool:
    try:
        return host is not None and (host == "localhost" or ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False


def _written(name: str, value: str) -> str:
    if _BARE.fullmatch(value):
        return value
    # dotenv readers expand ${…} even between single quotes, and every reader has different escapes.
    if any(text in value for text in ("'", "\\", "${", "\n", "\r", "\0")):
        raise NotConfigured(
            f"{name} holds a quote, a backslash, a line break or ${{, which programs read in different ways from a "
            "file: use --export, write it as %27, %5C, %24 in a URL, or choose another password"
        )
    return f"'{value}'"

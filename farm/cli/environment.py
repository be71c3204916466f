"""What another process needs to find the farm: its settings as variables, in a file or for a shell."""

import ipaddress
import re
import shlex
from collections.abc import Iterator
from urllib.parse import urlsplit

from pydantic import SecretStr

from farm.errors import NotConfigured
from farm.jobs.database import database_url
from farm.settings import Settings

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
"""What all processes of a farm have in common; the other settings are each process's own."""
_BARE = re.compile(r"[\w@%+=:,./?\[\]-]*", re.ASCII)


def variables(settings: Settings) -> dict[str, str]:
    """`FARM_*` of all that was set and is every process's; what is left out has the same default everywhere."""
    found = {}
    for name in SHARED:
        if name in settings.model_fields_set:
            value = getattr(settings, name)
            text = value.get_secret_value() if isinstance(value, SecretStr) else value
            found[f"FARM_{name.upper()}"] = "none" if text is None else str(text)
    return found


def as_file(values: dict[str, str]) -> str:
    """Lines that dotenv readers, systemd's `EnvironmentFile=`, `docker --env-file` and shells all read alike.

    Quotes are written where a value can't do without; Docker, which takes them literally, can't have such a value.
    Raises `NotConfigured` for one that can't be written for all readers.
    """
    return "".join(f"{name}={_written(name, value)}\n" for name, value in values.items())


def as_shell(values: dict[str, str]) -> str:
    """Lines for `eval` in a shell."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())


def reach(settings: Settings) -> Iterator[str]:
    """What keeps other machines from this farm, a line each, and what to do about it."""
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
        yield "there are no keys for S3 in it: each machine needs AWS credentials of its own, or a role"


def _loopback(host: str | None) -> bool:
    try:
        return host is not None and (host == "localhost" or ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False


def _written(name: str, value: str) -> str:
    if _BARE.fullmatch(value):
        return value
    # dotenv readers look for ${…} even between single quotes, and no two of the readers agree on escapes.
    if any(text in value for text in ("'", "\\", "${", "\n", "\r", "\0")):
        raise NotConfigured(
            f"{name} holds a quote, a backslash, a line break or ${{, which programs read in different ways from a "
            "file: use --export, write it as %27, %5C, %24 in a URL, or choose another password"
        )
    return f"'{value}'"

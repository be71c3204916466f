"""Checks of the object store: whether the farm can use it, and whether it requires credentials."""

import contextlib
import secrets
from collections.abc import Callable

from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from farm.errors import FarmError, StorageUnavailable
from farm.objects.storage import Storage, new_session, without_login
from farm.runtime.finding import Finding
from farm.settings import Settings


def check_storage(settings: Settings) -> Finding:
    """Write, read and delete a small object, and try the same without credentials."""
    where = f"{without_login(settings.s3_endpoint_url or 'AWS S3')}, bucket {settings.s3_bucket}"
    storage = Storage(settings)
    key, data = f".doctor-{secrets.token_hex(8)}", secrets.token_bytes(64)
    try:
        storage.ping()
        storage.put(key, data)
        try:
            same = storage.get(key) == data
            allowed = _allowed_without_credentials(settings, key)
        finally:
            storage.delete(key)
    except StorageUnavailable as error:
        return Finding("storage", "bad", str(error), _remedy(error))
    except FarmError as error:
        return Finding(
            "storage", "bad", f"{where}: the object just written is missing: {error}", "look at the store's log"
        )
    finally:
        storage.close()
    if not same:
        return Finding("storage", "bad", f"{where}: other bytes were read than written", "look at the store's log")
    if allowed:
        can = " and ".join(allowed)
        return Finding("storage", "warn", f"{where}: without credentials anyone can {can}", "take away public access")
    return Finding("storage", "ok", f"{where}: writes, reads and deletes, and refuses anonymous access")


def _remedy(error: StorageUnavailable) -> str:
    cause = error.__cause__
    code = cause.response["Error"].get("Code") if isinstance(cause, ClientError) else None
    if code == "NoSuchBucket":
        return "make the bucket, or correct FARM_S3_BUCKET"
    if code == "404":
        return "correct FARM_S3_ENDPOINT_URL, or start what is behind it: no object store answers there"
    if code is not None:
        return "correct the credentials (FARM_S3_ACCESS_KEY_ID and …_SECRET_ACCESS_KEY, or AWS_*) or their rights"
    return "start the store, or correct FARM_S3_ENDPOINT_URL"


def _allowed_without_credentials(settings: Settings, key: str) -> list[str]:
    """The operations that the bucket allows without credentials; writes are tried on the object with this key."""
    client = new_session(region_name=settings.s3_region).client(
        "s3",
        endpoint_url=settings.s3_endpoint_url,
        config=Config(
            signature_version=UNSIGNED,
            request_checksum_calculation="when_required",
            connect_timeout=3,
            read_timeout=5,
            retries={"total_max_attempts": 1},
            s3={"addressing_style": "path" if settings.s3_endpoint_url else "auto"},
        ),
    )
    bucket = settings.s3_bucket
    requests: dict[str, Callable[[], object]] = {
        "read the pictures": lambda: client.get_object(Bucket=bucket, Key=key)["Body"].close(),
        "list them": lambda: client.list_objects_v2(Bucket=bucket, MaxKeys=1),
        "write over them": lambda: client.put_object(Bucket=bucket, Key=key, Body=b"from a stranger"),
    }
    allowed = []
    for name, request in requests.items():
        with contextlib.suppress(ClientError, BotoCoreError):
            request()
            allowed.append(name)
    client.close()
    return allowed

"""Addresses of objects, made without a request to the object store."""

from farm.objects.storage import Storage
from farm.settings import Settings

INSIDE = {"database_url": "", "broker_url": "", "s3_bucket": "farm", "s3_endpoint_url": "http://s3:8333"}
KEYS = {"s3_access_key_id": "key", "s3_secret_access_key": "secret"}


def presigned(**more: object) -> str:
    storage = Storage(Settings(**INSIDE, **KEYS, **more))
    try:
        return storage.url("first/00001.png")
    finally:
        storage.close()


def test_a_presigned_url_leads_where_the_settings_say_that_everybody_reaches_the_object_store() -> None:
    outside = presigned(s3_public_endpoint_url="https://pictures.example")
    assert outside.startswith("https://pictures.example/farm/first/00001.png?")
    assert "X-Amz-Signature=" in outside


def test_a_presigned_url_leads_to_the_object_store_itself_where_nothing_else_is_said() -> None:
    assert presigned().startswith("http://s3:8333/farm/first/00001.png?")

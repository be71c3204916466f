"""The object store: put, get, list, delete and presign over S3."""

import io
import re
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.loaders import Loader, create_loader

from farm.errors import NotFound, StorageUnavailable
from farm.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PRESIGN_SECONDS = 7 * 24 * 3600
"""The limit of signature version 4."""
_DELETE_CHUNK = 1000
"""The limit of DeleteObjects."""
_LINES_BYTES = 256 * 1024
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def without_login(url: str) -> str:
    """A URL without user and password, for messages."""
    return re.sub(r"(^|(?<=//))[^/?#]*@", "", url)


@cache
def _data_files() -> Loader:
    """The descriptions of services and endpoints that come with boto3, which are parsed once in a process."""
    return create_loader(botocore.session.get_session().get_config_variable("data_path"))


def new_session(**options: Any) -> boto3.session.Session:
    """A session with its own credentials; takes the arguments of `boto3.session.Session`."""
    session = botocore.session.get_session()
    session.register_component("data_loader", _data_files())
    return boto3.session.Session(botocore_session=session, **options)


class Storage:
    """One bucket of an S3 service; every method raises `StorageUnavailable` when it does not answer.

    Safe to use from many threads.
    """

    def __init__(self, settings: Settings) -> None:
        self.bucket = settings.s3_bucket
        self._endpoint = settings.s3_endpoint_url
        self._settings = settings
        self._public = settings.s3_public_endpoint_url or settings.s3_endpoint_url
        self._made: dict[tuple[str | None, bool], S3Client] = {}
        self._making = threading.Lock()
        self.outages = 0
        """The number of failed requests."""

    @property
    def _s3(self) -> "S3Client":
        return self._client(self._endpoint)

    def _client(self, endpoint: str | None, *, patient: bool = True) -> "S3Client":
        # The first client of a process reads boto3's data files for a third of a second, so it is made on first use.
        with self._making:
            if (endpoint, patient) not in self._made:
                secret = self._settings.s3_secret_access_key
                session = new_session(
                    aws_access_key_id=self._settings.s3_access_key_id,
                    aws_secret_access_key=secret.get_secret_value() if secret else None,
                    region_name=self._settings.s3_region,
                )
                made = session.client(
                    "s3",
                    endpoint_url=endpoint,
                    config=Config(
                        signature_version="s3v4",
                        connect_timeout=3,
                        read_timeout=20 if patient else 4,
                        retries={"mode": "standard", "total_max_attempts": 3 if patient else 2},
                        max_pool_connections=32,
                        # The signature contains the payload's SHA-256, which S3 checks: no second checksum.
                        request_checksum_calculation="when_required",
                        # A proxy from the environment cannot reach this machine's loopback interface.
                        proxies={} if urlsplit(endpoint or "").hostname in _LOOPBACK else None,
                        s3={"addressing_style": "path" if endpoint else "auto"},
                    ),
                )
                # Objects are small: `Expect: 100-continue` would only cost a round trip.
                made.meta.events.register_last("before-call.s3", _ask_nothing)
                _give_up(made, self._settings.lease_seconds)
                self._made[endpoint, patient] = made
            return self._made[endpoint, patient]

    def ensure_bucket(self) -> None:
        """Create the bucket if it does not exist."""
        with self._reached():
            try:
                self._s3.create_bucket(Bucket=self.bucket)
            except ClientError as error:
                if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

    def ping(self) -> None:
        """Raise `StorageUnavailable` within ten seconds unless the bucket can be read."""
        with self._reached():
            self._client(self._endpoint, patient=False).list_objects_v2(Bucket=self.bucket, MaxKeys=1)

    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        """Write an object, replacing one with the same key."""
        with self._reached(key):
            self._s3.put_object(Bucket=self.bucket, Key=key, Body=data, ContentType=content_type)

    def put_if(self, key: str, data: bytes, etag: str | None, content_type: str = "application/octet-stream") -> bool:
        """Write an object if its current ETag matches; None requires that the object does not exist.

        Returns whether it was written.
        """
        with self._reached(key):
            try:
                if etag is None:
                    self._s3.put_object(
                        Bucket=self.bucket, Key=key, Body=data, ContentType=content_type, IfNoneMatch="*"
                    )
                else:
                    self._s3.put_object(Bucket=self.bucket, Key=key, Body=data, ContentType=content_type, IfMatch=etag)
            except ClientError as error:
                if error.response["Error"]["Code"] in (
                    "PreconditionFailed",
                    "ConditionalRequestConflict",
                    "412",
                    "409",
                ):
                    return False
                raise
        return True

    def copy(self, source: str, key: str, size: int | None = None) -> bool:
        """Copy an object within the store; returns False without a copy if its size is not `size`.

        Raises `NotFound` if it does not exist.
        """
        with self._reached(source):
            # HEAD first: not every store reports a missing source of a copy.
            try:
                found = self._s3.head_object(Bucket=self.bucket, Key=source)
            except ClientError as error:
                if error.response["Error"].get("Code") != "404":
                    raise
                # A response to HEAD has no body, so a proxy may have sent the 404: a GET identifies the store's own
                # 404.
                self._s3.get_object(Bucket=self.bucket, Key=source, Range="bytes=0-0")["Body"].close()
                found = self._s3.head_object(Bucket=self.bucket, Key=source)
            if size is not None and found["ContentLength"] != size:
                return False
            self._s3.copy_object(Bucket=self.bucket, Key=key, CopySource={"Bucket": self.bucket, "Key": source})
        return True

    def put_stream(self, key: str, lines: Iterable[bytes], content_type: str) -> None:
        """Stream an object, in a few megabytes of memory.

        The write is atomic: an error of `lines` is raised, and nothing is written.
        """
        from boto3.s3.transfer import TransferConfig  # imported here, because most clients never need it

        with self._reached(key):
            self._s3.upload_fileobj(
                io.BufferedReader(_Joined(lines)),
                self.bucket,
                key,
                ExtraArgs={"ContentType": content_type},
                Config=TransferConfig(use_threads=False),
            )

    def lines(self, key: str) -> Iterator[bytes]:
        """Stream the lines of an object; raises `NotFound`."""
        with self._reached(key):
            yield from self._s3.get_object(Bucket=self.bucket, Key=key)["Body"].iter_lines(_LINES_BYTES)

    def get(self, key: str) -> bytes:
        """The bytes of an object; raises `NotFound`."""
        with self._reached(key):
            return self._s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def get_if_changed(self, key: str, etag: str | None = None) -> tuple[bytes, str] | None:
        """The bytes and the ETag of an object, or None if its ETag has not changed. Raises `NotFound`."""
        with self._reached(key):
            try:
                # An empty condition is refused: no object has this ETag.
                found = self._s3.get_object(Bucket=self.bucket, Key=key, IfNoneMatch=etag or '"-"')
            except ClientError as error:
                if error.response["Error"]["Code"] in ("304", "NotModified"):
                    return None
                raise
            return found["Body"].read(), found["ETag"]

    def delete(self, key: str) -> None:
        """Delete an object; a missing one is not an error."""
        with self._reached(key):
            self._s3.delete_object(Bucket=self.bucket, Key=key)

    def delete_many(self, keys: Iterable[str]) -> None:
        """Delete objects, a thousand per request; missing ones are not an error."""
        left = iter(keys)
        while chunk := list(islice(left, _DELETE_CHUNK)):
            with self._reached(chunk[0]):
                answer = self._s3.delete_objects(
                    Bucket=self.bucket, Delete={"Objects": [{"Key": key} for key in chunk], "Quiet": True}
                )
            kept = [found for found in answer.get("Errors", ()) if found.get("Code") != "NoSuchKey"]
            if kept:
                raise StorageUnavailable(f"bucket {self.bucket} keeps {len(kept)} objects, the first: {kept[0]}")

    def url(self, key: str, seconds: int = 3600) -> str:
        """A presigned URL, valid for `seconds` (at most seven days)."""
        with self._reached(key):
            return self._client(self._public).generate_presigned_url(
                "get_object", Params={"Bucket": self.bucket, "Key": key}, ExpiresIn=min(seconds, PRESIGN_SECONDS)
            )

    def keys(self, prefix: str = "") -> Iterator[str]:
        """The keys with a prefix, in order."""
        with self._reached(prefix):
            for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                yield from (found["Key"] for found in page.get("Contents", ()))

    @contextmanager
    def client(self, what: str) -> Iterator["S3Client"]:
        """The boto3 client, for operations of several calls; converts its errors to the farm's, which name `what`."""
        with self._reached(what):
            yield self._s3

    def close(self) -> None:
        """Close every connection."""
        for made in self._made.values():
            made.close()

    @contextmanager
    def _reached(self, what: str = "") -> Iterator[None]:
        shown = f"S3 at {without_login(self._endpoint) if self._endpoint else 'AWS'}, bucket {self.bucket}"
        try:
            yield
        except ClientError as error:
            code: Any = error.response["Error"].get("Code")
            # Answers to HEAD have no body; any other 404 without an error code comes from a proxy before the object
            # store.
            if code == "NoSuchKey" or (code == "404" and error.operation_name == "HeadObject"):
                raise NotFound(f"{shown} has no {what}") from error
            self.outages += 1
            raise StorageUnavailable(f"{shown}: {self._message(error)}") from error
        except (BotoCoreError, boto3.exceptions.Boto3Error, ValueError) as error:  # ValueError: an invalid URL
            self.outages += 1
            raise StorageUnavailable(f"{shown}: {self._message(error)}") from error

    def _message(self, error: Exception) -> str:
        # boto3 quotes the URL with its login.
        return str(error).replace(self._endpoint, without_login(self._endpoint)) if self._endpoint else str(error)


class _Joined(io.RawIOBase):
    """A readable file over an iterator of bytes."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._piece = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any, /) -> int:
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._piece = memoryview(piece)
        count = min(len(into), len(self._piece))
        into[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count


def _give_up(client: "S3Client", seconds: float) -> None:
    """Let the kernel drop data that is not acknowledged for `seconds`, on systems that can.

    Otherwise it retransmits for minutes, even after the process has ended: an object that a worker wrote before its
    network was cut would appear when the network is back, after the sweep.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # botocore has no setting for it.
        options = client._endpoint.http_session._socket_options  # type: ignore[attr-defined]  # noqa: SLF001
        options.append((socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds)))


def _ask_nothing(params: dict[str, Any], **_: Any) -> None:
    params["headers"].pop("Expect", None)

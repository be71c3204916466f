"""Objects of many gigabytes: sent in parts that go on where they were, read in ranges."""

import base64
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from farm.errors import NotFound, StorageUnavailable
from farm.objects.storage import Storage

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

Report = Callable[[int], None]
"""Told how many bytes more are there; from any thread."""

_PART_BYTES = 16 * 2**20
_MOST_PARTS = 9_000
"""S3 takes 10,000."""
_AT_ONCE = 8
_HASH = "sha256"
"""The key of an object's metadata that holds the SHA-256 of its bytes."""


@dataclass(frozen=True)
class Outgoing:
    """A file to be sent."""

    path: Path
    key: str
    bytes: int
    sha256: str


@dataclass
class _Upload:
    """A file on its way."""

    file: Outgoing
    id: str = ""
    parts: list[Future["CompletedPartTypeDef"]] = field(default_factory=list)
    """In their order; none if all of it is there already, or goes in one piece."""


def send(storage: Storage, files: Sequence[Outgoing], report: Report = lambda _: None) -> int:
    """Put files into the bucket, many parts of them at once; returns how many bytes were not there already.

    An object is there whole or not at all. Whoever is interrupted sends, the next time, only the parts that are
    missing. Raises `StorageUnavailable`.
    """
    sent: list[int] = []

    def told(count: int, was_sent: bool) -> None:
        sent.append(count if was_sent else 0)
        report(count)

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="send") as pool:
        try:
            under_way = [_begin(storage, file, pool, told) for file in files]
            for upload in under_way:
                parts = [part.result() for part in upload.parts]
                if upload.id:
                    with storage.reaching(upload.file.key) as s3:
                        s3.complete_multipart_upload(
                            Bucket=storage.bucket,
                            Key=upload.file.key,
                            UploadId=upload.id,
                            MultipartUpload={"Parts": parts},
                        )
        finally:
            pool.shutdown(cancel_futures=True)
    return sum(sent)


def abort(storage: Storage, prefix: str) -> None:
    """Forget the parts of objects that were never completed, of all whose keys begin so."""
    with storage.reaching(prefix) as s3:
        for page in s3.get_paginator("list_multipart_uploads").paginate(Bucket=storage.bucket, Prefix=prefix):
            for found in page.get("Uploads", ()):
                if found["Key"].startswith(prefix):
                    s3.abort_multipart_upload(Bucket=storage.bucket, Key=found["Key"], UploadId=found["UploadId"])


def read(storage: Storage, bucket: str, key: str, start: int, length: int, etag: str | None = None) -> bytes:
    """A range of an object's bytes, of any bucket; of an object with that ETag, if one is given.

    Raises `NotFound`, or `StorageUnavailable` if what comes is shorter.
    """
    if not length:
        return b""
    with storage.reaching(f"s3://{bucket}/{key}") as s3:
        span = f"bytes={start}-{start + length - 1}"
        found = (
            s3.get_object(Bucket=bucket, Key=key, Range=span, IfMatch=etag)
            if etag
            else s3.get_object(Bucket=bucket, Key=key, Range=span)
        )
        data = found["Body"].read(length)
    if len(data) != length:
        raise StorageUnavailable(f"s3://{bucket}/{key} broke off: {len(data):,} of {length:,} bytes from {start:,} on")
    return data


def _begin(storage: Storage, file: Outgoing, pool: ThreadPoolExecutor, report: Callable[[int, bool], None]) -> _Upload:
    if _is_there(storage, file):
        report(file.bytes, False)
        return _Upload(file)
    if file.bytes <= _PART_BYTES:
        return _Upload(file, parts=[pool.submit(_put, storage, file, report)])
    upload = _Upload(file)
    with storage.reaching(file.key) as s3:
        # The newest: an older one may be of another time's part size.
        begun = [
            found["UploadId"]
            for page in s3.get_paginator("list_multipart_uploads").paginate(Bucket=storage.bucket, Prefix=file.key)
            for found in page.get("Uploads", ())
            if found["Key"] == file.key
        ]
        there: dict[int, str] = {}
        if begun:
            upload.id = begun[-1]
            pages = s3.get_paginator("list_parts").paginate(Bucket=storage.bucket, Key=file.key, UploadId=upload.id)
            there = {part["PartNumber"]: part["ETag"] for page in pages for part in page.get("Parts", ())}
        else:
            upload.id = s3.create_multipart_upload(Bucket=storage.bucket, Key=file.key, Metadata={_HASH: file.sha256})[
                "UploadId"
            ]
    for number, (start, length) in enumerate(_parts(file.bytes), 1):
        upload.parts.append(pool.submit(_send_part, storage, upload, number, start, length, there.get(number), report))
    return upload


def _is_there(storage: Storage, file: Outgoing) -> bool:
    try:
        with storage.reaching(file.key) as s3:
            found = s3.head_object(Bucket=storage.bucket, Key=file.key)
    except NotFound:
        return False
    return found["ContentLength"] == file.bytes and found["Metadata"].get(_HASH) == file.sha256


def _parts(size: int) -> Iterator[tuple[int, int]]:
    length = max(_PART_BYTES, -(-size // _MOST_PARTS))
    for start in range(0, size, length):
        yield start, min(length, size - start)


def _put(storage: Storage, file: Outgoing, report: Callable[[int, bool], None]) -> "CompletedPartTypeDef":
    data = file.path.read_bytes()
    with storage.reaching(file.key) as s3:
        s3.put_object(
            Bucket=storage.bucket, Key=file.key, Body=data, Metadata={_HASH: file.sha256}, ContentMD5=_md5(data)[0]
        )
    report(len(data), True)
    return {}


def _send_part(
    storage: Storage,
    upload: _Upload,
    number: int,
    start: int,
    length: int,
    there: str | None,
    report: Callable[[int, bool], None],
) -> "CompletedPartTypeDef":
    with upload.file.path.open("rb") as stream:
        stream.seek(start)
        data = stream.read(length)
    md5, hexadecimal = _md5(data)
    # Where a store encrypts, its ETag is no MD5: the part is sent anew.
    if there is not None and there.strip('"') == hexadecimal:
        report(length, False)
        return {"PartNumber": number, "ETag": there}
    with storage.reaching(upload.file.key) as s3:
        etag = s3.upload_part(
            Bucket=storage.bucket,
            Key=upload.file.key,
            UploadId=upload.id,
            PartNumber=number,
            Body=data,
            ContentMD5=md5,
        )["ETag"]
    report(length, True)
    return {"PartNumber": number, "ETag": etag}


def _md5(data: bytes) -> tuple[str, str]:
    """An MD5 in base64 as S3 wants to be told it, and in hexadecimal as it says it itself."""
    digest = hashlib.md5(data, usedforsecurity=False)
    return base64.b64encode(digest.digest()).decode(), digest.hexdigest()

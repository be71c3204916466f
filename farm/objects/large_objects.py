"""Objects of many gigabytes: uploads in parts that can be resumed, reads of ranges."""

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
"""Called with the number of further bytes, from any thread."""

_PART_BYTES = 16 * 2**20
_MOST_PARTS = 9_000
"""S3 allows 10,000."""
_AT_ONCE = 8
_HASH = "sha256"
"""The metadata key with the SHA-256 of an object's bytes."""


@dataclass(frozen=True)
class Outgoing:
    """A file to upload."""

    path: Path
    key: str
    bytes: int
    sha256: str


@dataclass
class _Upload:
    """An upload in progress."""

    file: Outgoing
    id: str = ""
    parts: list[Future["CompletedPartTypeDef"]] = field(default_factory=list)
    """In order; empty if the object exists already or is uploaded in one piece."""


def send(storage: Storage, files: Sequence[Outgoing], report: Report = lambda _: None) -> int:
    """Upload files, many parts at once; returns how many bytes were sent.

    An object appears whole or not at all. After an interruption the next call sends only the missing parts. Raises
    `StorageUnavailable`.
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
    """Abort the incomplete uploads of all keys with a prefix."""
    with storage.reaching(prefix) as s3:
        for page in s3.get_paginator("list_multipart_uploads").paginate(Bucket=storage.bucket, Prefix=prefix):
            for found in page.get("Uploads", ()):
                if found["Key"].startswith(prefix):
                    s3.abort_multipart_upload(Bucket=storage.bucket, Key=found["Key"], UploadId=found["UploadId"])


def read(storage: Storage, bucket: str, key: str, start: int, length: int, etag: str | None = None) -> bytes:
    """A range of bytes of an object in any bucket, with that ETag if one is given.

    Raises `NotFound`, or `StorageUnavailable` for a short answer.
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
        # The newest: an older one may have another part size.
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
    # If the store encrypts, its ETag is not an MD5, and the part is sent again.
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
    """An MD5 in base64, as S3 expects it, and in hexadecimal, as S3 returns it."""
    digest = hashlib.md5(data, usedforsecurity=False)
    return base64.b64encode(digest.digest()).decode(), digest.hexdigest()

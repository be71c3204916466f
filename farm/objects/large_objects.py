"""Objects of many gigabytes: uploaded in parts that a later try resumes, read in ranges.

boto3's own transfers (s3transfer) can't resume: each starts a new upload, and aborts it on failure.
"""

import base64
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from farm.errors import NotFound, StorageUnavailable
from farm.objects.storage import Storage
from farm.runtime.parallel import parallel_map

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

Report = Callable[[int], None]
"""Called with the number of bytes that have arrived since the last call."""

_PART_BYTES = 16 * 2**20
_MOST_PARTS = 9_000
"""S3 accepts 10,000."""
_HASH = "sha256"
"""The key of an object's metadata with the SHA-256 of its bytes."""


@dataclass(frozen=True)
class Outgoing:
    """A file to upload."""

    path: Path
    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Part:
    """A range of a file that is sent in one request."""

    file: Outgoing
    start: int
    length: int
    number: int = 1
    upload_id: str | None = None
    """None for a file that is small enough to be put whole."""
    stored_etag: str | None = None
    """The ETag of this part in the store, if an interrupted upload left it there."""

    @property
    def is_last(self) -> bool:
        return self.start + self.length == self.file.bytes


def upload_files(storage: Storage, files: Sequence[Outgoing], report: Report = lambda _: None) -> int:
    """Upload files into the bucket, several parts at once; returns the number of bytes that were not stored before.

    An object is stored whole or not at all. After an interruption the next call sends only the missing parts. Raises
    `StorageUnavailable`.
    """
    sent = 0
    etags: list[CompletedPartTypeDef] = []
    parts = (part for file in files for part in _missing_parts(storage, file, report))
    with closing(parallel_map(partial(_upload_part, storage), parts)) as stored:
        for part, etag in stored:
            sent += part.length if etag != part.stored_etag else 0
            report(part.length)
            etags.append({"PartNumber": part.number, "ETag": etag})
            if part.is_last:
                if part.upload_id is not None:
                    _complete(storage, part.file.key, part.upload_id, etags)
                etags = []
    return sent


def abort_uploads(storage: Storage, prefix: str) -> None:
    """Delete the parts of interrupted uploads whose keys have a prefix."""
    with storage.client(prefix) as s3:
        for page in s3.get_paginator("list_multipart_uploads").paginate(Bucket=storage.bucket, Prefix=prefix):
            for found in page.get("Uploads", ()):
                if found["Key"].startswith(prefix):
                    s3.abort_multipart_upload(Bucket=storage.bucket, Key=found["Key"], UploadId=found["UploadId"])


def read_range(storage: Storage, bucket: str, key: str, start: int, length: int, etag: str | None = None) -> bytes:
    """A range of an object's bytes, in any bucket; if an ETag is given, the object must still have it.

    Raises `NotFound`, and `StorageUnavailable` for a response that is too short.
    """
    if not length:
        return b""
    with storage.client(f"s3://{bucket}/{key}") as s3:
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


def _missing_parts(storage: Storage, file: Outgoing, report: Report) -> Iterator[_Part]:
    if _is_stored(storage, file):
        report(file.bytes)
    elif file.bytes <= _PART_BYTES:
        yield _Part(file, 0, file.bytes)
    else:
        upload_id, etags = _resume_upload(storage, file)
        length = max(_PART_BYTES, -(-file.bytes // _MOST_PARTS))
        for number, start in enumerate(range(0, file.bytes, length), 1):
            yield _Part(file, start, min(length, file.bytes - start), number, upload_id, etags.get(number))


def _is_stored(storage: Storage, file: Outgoing) -> bool:
    try:
        with storage.client(file.key) as s3:
            found = s3.head_object(Bucket=storage.bucket, Key=file.key)
    except NotFound:
        return False
    return found["ContentLength"] == file.bytes and found["Metadata"].get(_HASH) == file.sha256


def _resume_upload(storage: Storage, file: Outgoing) -> tuple[str, dict[int, str]]:
    """The id of an object's interrupted upload, or of a new upload, and the ETags of its parts by number."""
    with storage.client(file.key) as s3:
        interrupted = [
            found["UploadId"]
            for page in s3.get_paginator("list_multipart_uploads").paginate(Bucket=storage.bucket, Prefix=file.key)
            for found in page.get("Uploads", ())
            if found["Key"] == file.key
        ]
        if not interrupted:
            made = s3.create_multipart_upload(Bucket=storage.bucket, Key=file.key, Metadata={_HASH: file.sha256})
            return made["UploadId"], {}
        newest = interrupted[-1]  # older releases may have used another size of parts
        pages = s3.get_paginator("list_parts").paginate(Bucket=storage.bucket, Key=file.key, UploadId=newest)
        return newest, {part["PartNumber"]: part["ETag"] for page in pages for part in page.get("Parts", ())}


def _complete(storage: Storage, key: str, upload_id: str, etags: "list[CompletedPartTypeDef]") -> None:
    with storage.client(key) as s3:
        s3.complete_multipart_upload(
            Bucket=storage.bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": etags}
        )


def _upload_part(storage: Storage, part: _Part) -> tuple[_Part, str]:
    """Upload a part, unless the store has it; returns it with its ETag in the store."""
    with part.file.path.open("rb") as stream:
        stream.seek(part.start)
        data = stream.read(part.length)
    digest = hashlib.md5(data, usedforsecurity=False)
    # An encrypting store has different ETags: each part is sent again.
    if part.stored_etag is not None and part.stored_etag.strip('"') == digest.hexdigest():
        return part, part.stored_etag
    md5 = base64.b64encode(digest.digest()).decode()
    with storage.client(part.file.key) as s3:
        if part.upload_id is None:
            found = s3.put_object(
                Bucket=storage.bucket,
                Key=part.file.key,
                Body=data,
                Metadata={_HASH: part.file.sha256},
                ContentMD5=md5,
            )
            return part, found["ETag"]
        sent = s3.upload_part(
            Bucket=storage.bucket,
            Key=part.file.key,
            UploadId=part.upload_id,
            PartNumber=part.number,
            Body=data,
            ContentMD5=md5,
        )
        return part, sent["ETag"]

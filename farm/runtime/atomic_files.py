"""Files that a reader sees complete or not at all, in whichever way their writer ends."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path, *, private: bool = False, durable: bool = False) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` when the block ends, and is deleted if the block raises.

    `private` gives it mode 0600; `durable` makes it survive a crash of the machine. Two writers of one path do not
    disturb each other: the last to end wins.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666), "w+b") as file:  # noqa: PTH123
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_atomic(path: Path, content: bytes | str, *, private: bool = False, durable: bool = False) -> None:
    """Write bytes, or text as UTF-8, to a file by `atomic_file`."""
    with atomic_file(path, private=private, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, through to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)

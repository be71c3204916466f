"""Atomic files: readers see them complete or not at all, even if the writer is killed."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path, *, private: bool = False, durable: bool = False) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` when the block ends, and is deleted if the block raises.

    `private` gives it mode 0600; `durable` makes it survive a crash of the machine. Two writers of the same path
    do not interfere: the last to finish wins.
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
    """Write bytes, or text as UTF-8, to a file with `atomic_file`."""
    with atomic_file(path, private=private, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)

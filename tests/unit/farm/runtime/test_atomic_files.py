"""A file appears complete or not at all."""

from pathlib import Path

import pytest

from farm.runtime.atomic_files import atomic_file, write_atomic


def test_a_reader_sees_the_old_content_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    write_atomic(path, b"old")
    with atomic_file(path) as file:
        file.write(b"half of")
        file.flush()
        assert path.read_bytes() == b"old"
        file.write(b" the new")
    assert path.read_bytes() == b"half of the new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_while_writing_keeps_the_old_content_and_leaves_no_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    write_atomic(path, "old")
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.writelines([b"half of", None])  # type: ignore[list-item]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_path_do_not_write_into_each_others_file(tmp_path: Path) -> None:
    path = tmp_path / "sizes.json"
    with atomic_file(path) as slow:
        slow.write(b"slow ")
        with atomic_file(path) as fast:
            fast.write(b"fast")
        assert path.read_bytes() == b"fast"
        slow.write(b"writer")
    assert path.read_bytes() == b"slow writer"


@pytest.mark.parametrize("durable", [False, True])
def test_a_private_file_is_readable_by_its_owner_alone_even_where_it_replaces_an_open_one(
    tmp_path: Path, durable: bool
) -> None:
    path = tmp_path / "farm.env"
    write_atomic(path, "open")
    assert path.stat().st_mode & 0o444 == 0o444
    write_atomic(path, "π", private=True, durable=durable)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes() == "π".encode()

"""Keys of objects: readable, sortable and unique."""

import pytest

from farm.specs.object_keys import checkpoint_key, image_key, preview_key, slug, trajectory_keys


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red circle, on white!", "a-red-circle-on-white"),
        ("../../etc/passwd", "etc-passwd"),
        ("Ünïcödé", "unicode"),
        ("日本", ""),
        ("x" * 100, "x" * 48),
        ("\x1b[31m red", "31m-red"),
    ],
)
def test_a_slug_reminds_of_a_text_and_can_not_leave_its_place(text: str, expected: str) -> None:
    assert slug(text) == expected


def test_a_key_can_be_read_and_sorts() -> None:
    assert image_key("sea-x", 7, 2, "A cat") == "sea-x/00007-a-cat.a2.png"
    assert image_key("sea-x", 7, 1, "日本") == "sea-x/00007.a1.png"


def test_whatever_lies_beside_a_picture_has_its_batch_number_and_attempt_and_a_name_of_its_own() -> None:
    picture = image_key("sea-x", 7, 2, "A cat")
    others = [checkpoint_key("sea-x", 7, 2), preview_key("sea-x", 7, 2), *trajectory_keys(picture)]
    assert all(key.startswith("sea-x/00007") and ".a2." in key for key in others)
    assert len({picture, *others, checkpoint_key("sea-x", 7, 1), preview_key("sea-x", 7, 1)}) == 7

"""Contact sheets."""

from PIL import Image

from farm.show.contact_sheet import contact_sheet


def test_a_contact_sheet_has_every_picture_and_room_for_words() -> None:
    colours = [(n * 20, 255 - n * 20, 90) for n in range(10)]
    page = contact_sheet([(Image.new("RGB", (64, 64), colour), "a long caption " * 9) for colour in colours])
    found = {colour for _, colour in page.getcolors(page.width * page.height) or ()}
    assert set(colours) <= found


def test_a_contact_sheet_takes_pictures_that_are_missing_or_of_other_sizes() -> None:
    sheet = contact_sheet([(None, "failed"), (Image.new("RGB", (1024, 512)), "wide"), (Image.new("L", (8, 8)), "")])
    assert sheet.mode == "RGB"
    assert contact_sheet([]).width > 0
    assert contact_sheet([(None, "word" * 200)], columns=3, cell=100).width > 300

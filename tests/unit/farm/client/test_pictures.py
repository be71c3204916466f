"""What a picture is called, says about itself, and how many of them look on one page."""

import io
import json

import pytest
from PIL import Image

from farm.show.contact_sheet import contact_sheet
from farm.specs.object_keys import checkpoint_key, image_key, preview_key, slug, trajectory_keys
from farm.specs.spec import RenderSpec
from workers.outputs import png
from workers.render.request import Rendered


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


def rendered() -> Rendered:
    return Rendered(
        image=Image.new("RGB", (64, 72), (200, 30, 30)),
        model="here",
        model_sha256="ab" * 32,
        width=64,
        height=72,
        steps=20,
        scheduler="EulerDiscreteScheduler",
        device="cpu",
        dtype="float32",
        render_seconds=1.0,
        warnings=("cut",),
    )


def test_a_png_carries_its_parameters_as_text_and_its_spec_as_json() -> None:
    spec = RenderSpec(prompt="a cät\nsitting", negative_prompt="blurry", seed=5, num_inference_steps=20, model="sd15")
    data = png.encode(spec, rendered(), {"job": "sea-x-1"})
    image = Image.open(io.BytesIO(data))
    assert image.text["parameters"] == (
        "a cät\nsitting\nNegative prompt: blurry\nSteps: 20, Sampler: EulerDiscreteScheduler, CFG scale: 5, Seed: 5, "
        f"Size: 64x72, Model hash: ababababab, Model: sd15, Version: diffusion-farm {png.versions()['diffusion-farm']}"
    )
    everything = png.read(image)
    assert RenderSpec.model_validate(everything["spec"]) == spec
    assert everything["model_sha256"] == "ab" * 32
    assert everything["job"] == "sea-x-1"
    assert set(everything["versions"]) == {"diffusion-farm", "torch", "diffusers", "transformers"}
    json.dumps(everything)


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

"""Which pictures use guidance, and so need more memory and time."""

import pytest

from farm.specs.guidance import UNGUIDED, Guidance
from farm.specs.spec import RenderSpec

SD = Guidance("guidance_scale")
FLUX = Guidance("true_cfg_scale", requires="negative_prompt")


@pytest.mark.parametrize(
    ("guidance", "fields", "factor"),
    [
        (SD, {"guidance_scale": 1.0}, 1),
        (SD, {"guidance_scale": 1.5}, 2),
        (SD, {"guidance_scale": 1.0, "true_cfg_scale": 4.0}, 1),
        (FLUX, {"guidance_scale": 7.5}, 1),
        (FLUX, {"guidance_scale": 0.0}, 1),
        (FLUX, {"true_cfg_scale": 4.0}, 1),
        (FLUX, {"true_cfg_scale": 4.0, "negative_prompt": "low"}, 2),
        (UNGUIDED, {"guidance_scale": 7.5}, 1),
        (Guidance("guidance_scale", above=5.0, factor=3), {"guidance_scale": 7.5}, 3),
        (Guidance("guidance_scale", above=5.0, factor=3), {"guidance_scale": 5.0}, 1),
        (Guidance("a_field_of_a_later_release"), {}, 1),
        (Guidance("guidance_scale", requires="a_field_of_a_later_release"), {}, 1),
        (Guidance("prompt"), {}, 1),
    ],
)
def test_a_picture_takes_as_many_times_as_its_guidance_says(
    guidance: Guidance, fields: dict[str, object], factor: int
) -> None:
    assert guidance.factor_of(RenderSpec.parse({"prompt": "a", **fields})) == factor


def test_the_scale_of_a_picture_without_guidance_is_one() -> None:
    spec = RenderSpec(prompt="a", guidance_scale=7.5, true_cfg_scale=4.0)
    assert [guidance.scale_of(spec) for guidance in (SD, FLUX, UNGUIDED)] == [7.5, 1.0, 1.0]

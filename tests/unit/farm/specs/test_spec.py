import json

import pytest
from pydantic import ValidationError

from farm.errors import InvalidInput
from farm.specs.spec import MAX_SEED, RenderSpec


def complaints(**values: object) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        RenderSpec.parse({"prompt": "a cat", **values}, where="prompts.csv:3")
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("width", 65, "must be a multiple of 8, like 64 or 72"),
        ("height", 8, "greater than or equal to 64"),
        ("width", 5000, "less than or equal to 4096"),
        ("num_inference_steps", 0, "greater than or equal to 1, not 0"),
        ("num_inference_steps", 1001, "less than or equal to 1000"),
        ("num_inference_steps", 2.5, "integer"),
        ("guidance_scale", -0.1, "greater than or equal to 0"),
        ("guidance_scale", float("nan"), "finite"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**32, "less than or equal to 4294967295"),
        ("scheduler", "eular", "no sampler 'eular'; known are ddim"),
        ("guidance_rescale", 1.1, "less than or equal to 1, not 1.1"),
        ("true_cfg_scale", 0.5, "greater than or equal to 1"),
        ("clip_skip", 0, "greater than or equal to 1"),
        ("clip_skip", 24, "less than or equal to 23"),
        ("eta", -0.1, "greater than or equal to 0"),
        ("eta", 1.1, "less than or equal to 1"),
        ("deterministic", "perhaps", "boolean"),
        ("model", "../etc", "not a model's name"),
        ("model", "a:b", "not a model's name"),
        ("prompt", "nul \x00", "NUL"),
        ("prompt", "x" * 20_001, "at most 20000 characters"),
        ("negative", "blurry", "no such field; known are prompt, negative_prompt"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_place_and_bound(field: str, value: object, said: str) -> None:
    (complaint,) = complaints(**{field: value})
    assert complaint.startswith(f"prompts.csv:3: {field}: ")
    assert said in complaint


def test_a_trajectory_is_of_at_most_two_hundred_steps() -> None:
    assert RenderSpec(prompt="a", trajectory=True, num_inference_steps=200).trajectory
    assert RenderSpec(prompt="a", num_inference_steps=201).num_inference_steps == 201
    (complaint,) = complaints(trajectory=True, num_inference_steps=201)
    assert complaint == "prompts.csv:3: trajectory: keeps a picture a step, 200 at most; num_inference_steps is 201"
    (other,) = complaints(trajectory=True, num_inference_steps=1001)
    assert "num_inference_steps" in other


def test_a_spec_from_before_there_were_more_fields_has_their_defaults() -> None:
    stored = {"prompt": "a", "negative_prompt": "", "num_inference_steps": 25, "guidance_scale": 5.0, "width": None}
    stored |= {"height": None, "seed": 3, "scheduler": None, "model": "tiny"}
    spec = RenderSpec.model_validate(stored)
    assert spec == RenderSpec(prompt="a", seed=3)
    assert (spec.guidance_rescale, spec.true_cfg_scale, spec.clip_skip, spec.eta) == (0.0, 1.0, None, 0.0)
    assert (spec.deterministic, spec.trajectory) == (False, False)


def test_all_that_is_wrong_with_a_spec_is_said_at_once() -> None:
    assert len(complaints(width=1, height=1, seed=-1)) == 3


@pytest.mark.parametrize("given", [None, 7, ["a", "list"], {}])
def test_what_is_no_spec_is_refused(given: object) -> None:
    with pytest.raises(InvalidInput):
        RenderSpec.parse(given)  # type: ignore[arg-type]


def test_a_prompt_alone_is_a_spec_with_a_drawn_seed() -> None:
    one, other = RenderSpec.parse("a cat"), RenderSpec.parse("a cat")
    assert 0 <= one.seed <= MAX_SEED
    assert one.seed != other.seed
    assert RenderSpec(prompt="a cat", seed=None).seed != one.seed  # type: ignore[arg-type]


def test_an_empty_prompt_draws_unconditionally() -> None:
    assert RenderSpec(prompt="").prompt == ""


def test_text_from_a_table_is_read_as_numbers() -> None:
    spec = RenderSpec.parse({"prompt": "a", "width": "128", "guidance_scale": "7.5", "seed": "3"})
    assert (spec.width, spec.guidance_scale, spec.seed) == (128, 7.5, 3)


def test_a_spec_can_not_be_changed() -> None:
    with pytest.raises(ValidationError):
        RenderSpec(prompt="a").prompt = "b"  # type: ignore[misc]


def test_the_hash_tells_specs_apart_and_survives_json() -> None:
    spec = RenderSpec(prompt="ä", seed=1, scheduler="euler_a")
    again = RenderSpec.model_validate(json.loads(json.dumps(spec.model_dump(mode="json"))))
    assert again == spec
    assert again.sha256() == spec.sha256()
    assert RenderSpec(prompt="ä", seed=2, scheduler="euler_a").sha256() != spec.sha256()


def test_a_seed_of_none_counts_as_not_chosen() -> None:
    for spec in (
        RenderSpec(prompt="x", seed=None),
        RenderSpec.parse({"prompt": "x", "seed": None}),
        RenderSpec.model_validate_json('{"prompt": "x", "seed": null}'),
    ):
        assert "seed" not in spec.model_fields_set
        assert spec.seed >= 0


@pytest.mark.parametrize(
    "value", [10**5000, [[]] * 10**6, "x" * 10**7, {"a": [1] * 10**6}], ids=["number", "list", "text", "object"]
)
def test_an_error_message_is_short_however_large_the_value_is(value: object) -> None:
    with pytest.raises(InvalidInput) as raised:
        RenderSpec.parse({"prompt": "x", "guidance_scale": value})
    assert len(str(raised.value)) < 250


def test_a_value_too_deep_to_be_shown_is_invalid_input() -> None:
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(InvalidInput):
        RenderSpec.parse({"prompt": deep})


def test_the_stored_form_of_a_spec_is_that_of_release_0_1_unless_it_uses_a_later_field() -> None:
    stored = (
        '{"prompt":"a","negative_prompt":"","num_inference_steps":25,"guidance_scale":5.0,"guidance_rescale":0.0,'
        '"true_cfg_scale":1.0,"clip_skip":null,"eta":0.0,"width":null,"height":null,"seed":1,"scheduler":null,'
        '"model":"tiny","deterministic":false,"trajectory":false}'
    )
    assert RenderSpec(prompt="a", seed=1).to_json() == stored
    assert RenderSpec.model_validate_json(stored) == RenderSpec(prompt="a", seed=1)
    later = set(RenderSpec.model_fields) - set(json.loads(stored))
    for name in later:
        assert f'"{name}":' in RenderSpec(prompt="a", seed=1).model_copy(update={name: 2}).to_json()

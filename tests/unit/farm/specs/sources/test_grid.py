"""Grids and seeds: the specs they make of a row, their order, and the errors."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from farm.errors import InvalidInput
from farm.specs.sources import Expansion, Problems, is_axis, specs
from farm.specs.sources.grid import MAX_SPECS
from farm.specs.spec import MAX_SEED, RenderSpec


def expansion(**options: Any) -> Expansion:
    problems = Problems()
    made = Expansion.read(problems, **options)
    if problems:
        raise problems.error()
    return made


def stream(*found: Any, defaults: dict[str, Any] | None = None, **options: Any) -> Iterator[RenderSpec]:
    return specs(found, defaults or {}, expansion=expansion(**options))


def complaints(**options: Any) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        list(stream("a", **options))
    return [str(problem) for problem in caught.value.problems]


def test_rows_are_outermost_then_the_axes_in_their_order_then_the_seeds() -> None:
    made = stream("a", "b", grid="guidance=5,7.5 steps=20,30", seeds="3,1")
    assert [(s.prompt, s.guidance_scale, s.num_inference_steps, s.seed) for s in made] == list(
        itertools.product("ab", (5.0, 7.5), (20, 30), (3, 1))
    )


@pytest.mark.parametrize(
    ("grid", "field", "values"),
    [
        ("steps=20,30", "num_inference_steps", [20, 30]),
        ("num_inference_steps=8..11", "num_inference_steps", [8, 9, 10, 11]),
        ("steps=1,3..4,9", "num_inference_steps", [1, 3, 4, 9]),
        ("guidance=5,7.5", "guidance_scale", [5.0, 7.5]),
        ("sampler=euler_a, ddim", "scheduler", ["euler_a", "ddim"]),
        ('negative="blurry, dark",ugly', "negative_prompt", ["blurry, dark", "ugly"]),
        ("model=tiny,org/other", "model", ["tiny", "org/other"]),
        ("trajectory=true,false", "trajectory", [True, False]),
        ("clip_skip=1..2", "clip_skip", [1, 2]),
        ({"steps": [20, 30]}, "num_inference_steps", [20, 30]),
        ({"steps": range(20, 40, 10)}, "num_inference_steps", [20, 30]),
        ({"steps": (n for n in (20, 30))}, "num_inference_steps", [20, 30]),
        ({"scheduler": [None, "ddim"]}, "scheduler", [None, "ddim"]),
        ({"steps": "20,30"}, "num_inference_steps", [20, 30]),
        (["steps=20,30"], "num_inference_steps", [20, 30]),
    ],
)
def test_an_axis_is_written_as_people_write_it(grid: Any, field: str, values: list[Any]) -> None:
    # Each value is used again for the second row: an iterator is not exhausted by the first.
    assert [getattr(spec, field) for spec in stream("a", "b", grid=grid)] == values * 2


@pytest.mark.parametrize("grid", ["size=64x128,256X512", {"size": [(64, 128), "256x512"]}])
def test_a_size_is_width_and_height(grid: Any) -> None:
    assert [(spec.width, spec.height) for spec in stream("a", grid=grid)] == [(64, 128), (256, 512)]


def test_a_grid_outweighs_defaults_and_rows_whole_specs_included() -> None:
    whole = RenderSpec(prompt="whole", seed=7, num_inference_steps=5, guidance_scale=9)
    made = list(stream({"prompt": "row", "num_inference_steps": 50}, whole, defaults={"seed": 1}, grid="steps=20,30"))
    assert [(s.prompt, s.num_inference_steps, s.seed, s.guidance_scale) for s in made] == [
        ("row", 20, 1, 5.0),
        ("row", 30, 1, 5.0),
        ("whole", 20, 7, 9.0),
        ("whole", 30, 7, 9.0),
    ]


def test_seeds_of_a_range_include_both_ends() -> None:
    assert [spec.seed for spec in stream("a", seeds="0..3")] == [0, 1, 2, 3]
    assert [spec.seed for spec in stream("a", seeds=range(3))] == [0, 1, 2]


def test_a_seed_left_out_stays_for_others_to_draw() -> None:
    for made in stream("a", {"prompt": "b", "seed": None}, grid="steps=20,30"):
        assert "seed" not in made.model_fields_set
    assert len({spec.seed for spec in stream("a", seeds=[None] * 9)}) > 1


def test_a_long_range_is_never_held() -> None:
    made = stream(*["a"] * 3, seeds=range(MAX_SPECS))
    assert [spec.seed for spec in itertools.islice(made, 3)] == [0, 1, 2]
    with pytest.raises(InvalidInput, match=f"grid: has {MAX_SEED + 1:,} places"):
        stream("a", seeds=f"0..{MAX_SEED}")


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("step=20", "grid: step: no such field; known are negative, steps, guidance, sampler, size, prompt"),
        ("steps", "grid: write NAME=VALUE,VALUE…, not 'steps'"),
        ("steps=20 30", "grid: steps: should be a valid integer"),
        ("steps=", "grid: steps: has no values"),
        ("steps=20,,30", "grid: steps: has an empty value"),
        ("steps=0,20,1001", "grid: steps: should be greater than or equal to 1, not '0'"),
        ("steps=5..1", "grid: steps: 5..1 is empty"),
        ("steps=1..100000", "grid: steps: should be less than or equal to 1000, not 1001"),
        ("width=64..80", "grid: width: must be a multiple of 8, like 64 or 72"),
        ("guidance=1..3", "grid: guidance: should be a valid number"),
        ("sampler=eular", "grid: sampler: no sampler 'eular'"),
        ("size=512", "grid: size: write WIDTHxHEIGHT, not '512'"),
        ("size=512x51", "grid: size: "),
        ("steps=20 num_inference_steps=30", "grid: num_inference_steps: is varied twice"),
        ("size=64x64 width=128", "grid: width: is varied twice"),
        ('prompt="never closed', "grid: write NAME=VALUE"),
        ({"steps": 20}, "grid: steps: should be several values, not 20"),
        ({"steps": []}, "grid: steps: has no values"),
        ({"steps": None}, "grid: steps: should be several values"),
        ({"size": [(1, 2, 3)]}, "grid: size: write WIDTHxHEIGHT, not (1, 2, 3)"),
        ({5: [1]}, "grid: 5: no such field"),
    ],
)
def test_what_is_wrong_with_a_grid_is_said_once_before_any_row(grid: Any, said: str) -> None:
    def never() -> Iterator[str]:
        raise AssertionError("a row was read")
        yield ""

    with pytest.raises(InvalidInput) as caught:
        specs(never(), {}, expansion=expansion(grid=grid))
    assert str(caught.value.problems[0]).startswith(said)


def test_everything_wrong_with_a_grid_is_said_at_once() -> None:
    found = complaints(grid="steps=0,-1 sampler=eular colour=red", seeds="-1")
    assert [line.split(": ")[:2] for line in found] == [
        ["grid", "steps"],
        ["grid", "steps"],
        ["grid", "sampler"],
        ["grid", "colour"],
        ["seeds", "seed"],
    ]


def test_seeds_and_an_axis_of_seeds_are_one_too_many() -> None:
    assert complaints(grid="seed=1,2", seeds="3") == ["seeds: seed: is varied twice"]


def test_a_bad_row_is_told_once_however_large_the_grid() -> None:
    with pytest.raises(InvalidInput) as caught:
        list(stream({"prompt": "a", "eta": 7}, seeds=range(1000), grid="steps=1..1000"))
    assert [str(problem) for problem in caught.value.problems] == [
        "spec 1: eta: should be less than or equal to 1, not 7"
    ]


def test_grid_values_that_are_invalid_together_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"trajectory: keeps a picture a step, 200 at most; .* is 300"):
        list(stream("a", grid="trajectory=false,true steps=100,300"))


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("steps=20,30", True),
        ("size=64x64", True),
        ("eta=0,1", True),
        ("a cat", False),
        ("colour=red", False),
        ("a=b", False),
    ],
)
def test_only_the_name_of_a_field_makes_an_argument_an_axis(text: str, is_one: bool) -> None:
    assert is_axis(text) is is_one

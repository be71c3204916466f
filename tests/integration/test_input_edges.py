"""Names, owners, keys and priorities that can't be stored are rejected with the name of the field."""

from typing import Any

import pytest

from farm.client.farm import Farm
from farm.errors import InvalidInput, NotFound
from farm.settings import Settings


@pytest.mark.parametrize(
    ("field", "given"),
    [
        *((field, wrong) for field in ("name", "owner", "key") for wrong in ("a\udcffb", "a\0b", "x" * 300, 5)),
        *(("priority", wrong) for wrong in ("x", None, -1, 101, 5.5, 10**5000)),
    ],
    ids=lambda value: repr(value)[:12] if not isinstance(value, int) else f"{value:.0e}" if value < 1000 else "huge",
)
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_what_can_not_be_kept_is_invalid_input_that_names_its_field(settings: Settings, field: str, given: Any) -> None:
    with Farm(settings) as farm:
        with pytest.raises(InvalidInput) as raised:
            farm.submit(["x"], **{field: given})
        assert [problem.field for problem in raised.value.problems] == [field]
        assert len(str(raised.value)) < 200
        assert farm.batches() == []


@pytest.mark.parametrize("given", ["\0", "a\0b", "a\udcffb", "x" * 300, None], ids=repr)
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_what_can_not_be_a_name_is_nobodys(settings: Settings, given: Any) -> None:
    with Farm(settings) as farm:
        with pytest.raises(NotFound, match="there is no batch"):
            farm.batch(given)
        with pytest.raises(NotFound, match="there is no job"):
            farm.job(given)
        with pytest.raises(InvalidInput) as raised:
            farm.owner(given)
        assert [problem.field for problem in raised.value.problems] == ["owner"]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_names_of_every_script_and_of_the_full_length_are_kept(settings: Settings) -> None:
    with Farm(settings) as farm:
        batch = farm.submit(["x"], name="日" * 200, owner="\U0001f600" * 200, key="é" * 200)
        assert batch.status().owner == "\U0001f600" * 200


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_seed_of_null_is_a_seed_left_out(settings: Settings) -> None:
    with Farm(settings) as farm:
        (drawn,) = farm.submit([{"prompt": "x", "seed": None}], key="k")
        (same,) = farm.submit([{"prompt": "x"}], key="other than k")
        (default,) = farm.submit([{"prompt": "x", "seed": None}], seed=7)
    assert drawn.info.spec.seed != same.info.spec.seed  # seeds are derived from the keys
    assert default.info.spec.seed == 7

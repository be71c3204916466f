"""The benchmark's harness, with next to no work: every measurement gives its row."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from benchmarks import work
from benchmarks.apart import Apart, Run
from benchmarks.baseline import Diffusers
from benchmarks.cases import Cases, Counts
from benchmarks.ours import Farm
from benchmarks.table import table
from tests.checkpoints import build_checkpoint

TINY = Counts(
    repeats=1,
    farm=6,
    serial=1,
    batches=(1, 2),
    mixed=4,
    loads=(1, 2),
    urgent=2,
    steps=4,
    most_steps=3,
    checkpoint_every=0.005,
)


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Farm, Diffusers]]:
    threads, place = torch.get_num_threads(), tmp_path_factory.mktemp("benchmark")
    folder = build_checkpoint(place / "checkpoint")
    farm = Farm(folder, "cpu", "float32", 1, 2, place / "sizes.json")
    yield farm, Diffusers(folder, "cpu", "float32", 1)
    farm.stop()
    torch.set_num_threads(threads)


@pytest.fixture
def cases(sides: tuple[Farm, Diffusers]) -> Cases:
    return Cases(*sides, 64, (64, 72), TINY)


@pytest.mark.parametrize("number", range(1, 9))
def test_every_case_measures_something_and_has_its_row(number: int, cases: Cases) -> None:
    row = cases.run(number)
    assert row.number == number
    assert row.value >= 0
    assert (row.met is None) == (not row.goal)
    assert row.what in table([row], ["a fact"])


def test_both_sides_draw_the_same_picture(cases: Cases) -> None:
    assert cases.difference() <= 1


def test_a_server_batches_what_is_equal_and_nothing_else(sides: tuple[Farm, Diffusers]) -> None:
    equal = work.uniform(3, 1, side=64, steps=2)
    other = [spec.model_copy(update={"guidance_scale": 3.0}) for spec in equal[:1]]
    run = sides[1].serve([*equal, *other], [0.0, 0.0, 0.0, 0.0], most=8)
    assert run.images == 4
    assert 2 <= run.calls <= 3  # the oldest may be gone before the others are there
    assert sides[1].serve(equal, [0.0] * 3, most=1).calls == 3


def test_the_same_seed_asks_for_the_same_work_at_the_same_times() -> None:
    assert work.mixed(5, 7, side=64) == work.mixed(5, 7, side=64)
    assert work.mixed(5, 7, side=64) != work.mixed(5, 8, side=64)
    times = work.arrivals(1000, 4.0, 7)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(250, rel=0.2)


def test_a_missed_goal_is_printed_as_a_miss(cases: Cases) -> None:
    row = cases.run(1)
    assert ("**miss**" in table([row], [])) == (row.value < 4.0)


def test_latency_is_read_from_its_percentiles() -> None:
    run = Run(101, 1.0, 0, tuple(float(second) for second in range(101)))
    assert (run.latency(50), run.latency(95), run.rate) == (50.0, 95.0, 101.0)


def test_a_side_lives_in_a_process_of_its_own() -> None:
    counting = Apart(Counter, "aab")
    try:
        assert counting.most_common(1) == [("a", 2)]
        with pytest.raises(AttributeError):
            counting.nothing_of_the_kind()
    finally:
        counting.close()

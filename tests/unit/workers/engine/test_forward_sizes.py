"""The best number of rows in a forward, measured on a pipeline whose forwards take scripted time."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.gated import request
from workers.engine import forward_sizes
from workers.engine.forward_sizes import FIXED_ROWS, NO_LIMIT, Curve, ForwardSizes
from workers.engine.step_scheduler import ForwardKey
from workers.pipelines.null import NullPipeline
from workers.render.request import RenderRequest

KEY = ForwardKey("tiny", (3, 8, 8), "torch.float32")
LARGE = ForwardKey("tiny", (3, 8, 16), "torch.float32")


@dataclass
class Clock:
    now: float = 100.0


@dataclass(frozen=True)
class Scripted(NullPipeline):
    """A pipeline whose forwards take a scripted time that depends on their rows, on a clock of its own."""

    clock: Clock = field(default_factory=Clock)
    seconds: Callable[[int], float] = lambda rows: 1.0 * rows
    fits: int = NO_LIMIT
    forwards: list[int] = field(default_factory=list)

    def denoise(self, requests: Sequence[RenderRequest], rows: int | None = None) -> torch.Tensor:
        self.forwards.append(len(requests))
        if len(requests) > self.fits:
            raise torch.OutOfMemoryError("no room")
        first = len(self.forwards) < 2 or self.forwards[-2] != len(requests)
        self.clock.now += self.seconds(len(requests)) * (9 if first else 1)  # the first of its size warms up
        return super().denoise(requests)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(forward_sizes, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def template() -> RenderRequest:
    one = request("a")
    NullPipeline().plan(one)
    NullPipeline().encode(one)
    one.rows = 2
    return one


def saturating(rows: int) -> float:
    """Return the seconds of a forward: constant up to 8 rows, and proportional to the rows above."""
    return 0.01 * max(1.0, rows / 8)


# --- measuring


def test_the_smallest_size_beyond_which_more_rows_gain_nothing_is_best(clock: Clock, template: RenderRequest) -> None:
    pipeline = Scripted(clock=clock, seconds=saturating)
    assert ForwardSizes().measure(pipeline, KEY, template) == 8
    assert sorted(set(pipeline.forwards)) == [1, 2, 4, 8, 16, 32]  # 16 and 32 are the two doublings without a gain


def test_two_doublings_without_a_gain_end_it(clock: Clock, template: RenderRequest) -> None:
    pipeline = Scripted(clock=clock, seconds=lambda rows: 0.01 * rows)
    assert ForwardSizes(slots=32).measure(pipeline, KEY, template) == 1
    assert sorted(set(pipeline.forwards)) == [1, 2, 4]


def test_one_doubling_without_a_gain_does_not(clock: Clock, template: RenderRequest) -> None:
    took = {1: 1.0, 2: 2.0, 4: 2.0, 8: 4.0, 16: 8.0}
    pipeline = Scripted(clock=clock, seconds=lambda rows: took[rows] / 100)
    assert ForwardSizes(slots=32).measure(pipeline, KEY, template) == 4


def test_a_gain_of_next_to_nothing_is_none(clock: Clock, template: RenderRequest) -> None:
    pipeline = Scripted(clock=clock, seconds=lambda rows: 0.01 * rows / (1.015 if rows > 1 else 1))
    assert ForwardSizes().measure(pipeline, KEY, template) == 1


def test_no_more_rows_are_tried_than_asked_for(clock: Clock, template: RenderRequest) -> None:
    pipeline = Scripted(clock=clock, seconds=lambda _: 0.01)
    assert ForwardSizes(slots=2).measure(pipeline, KEY, template) == 4
    assert max(pipeline.forwards) == 4


def test_a_slow_model_is_measured_once_a_size_and_for_half_a_minute(clock: Clock, template: RenderRequest) -> None:
    pipeline = Scripted(clock=clock, seconds=lambda _: 2.0)
    ForwardSizes(slots=32).measure(pipeline, KEY, template)
    assert pipeline.forwards == [1, 1, 2, 2]  # each size takes 20 seconds, including its warm-up


def test_rows_that_do_not_fit_are_the_end_of_it(clock: Clock, template: RenderRequest) -> None:
    pipeline = Scripted(clock=clock, seconds=lambda _: 0.01, fits=7)
    sizes = ForwardSizes()
    assert sizes.measure(pipeline, KEY, template) == 4


def test_even_if_no_row_fits_a_request_has_a_forward(clock: Clock, template: RenderRequest) -> None:
    assert ForwardSizes().measure(Scripted(clock=clock, fits=0), KEY, template) == 1


def test_a_model_that_can_not_be_measured_does_a_request_a_forward(
    template: RenderRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Scripted, "denoise", lambda *_: 1 / 0)
    assert ForwardSizes().measure(Scripted(), KEY, template) == template.rows
    assert "can't measure forwards" in caplog.text


def test_without_measuring_forwards_take_all_there_is(template: RenderRequest) -> None:
    pipeline = Scripted()
    assert ForwardSizes(measured=False).measure(pipeline, KEY, template) == NO_LIMIT
    assert pipeline.forwards == []


def test_each_shape_is_measured_once(clock: Clock, template: RenderRequest) -> None:
    pipeline, sizes = Scripted(clock=clock, seconds=saturating), ForwardSizes()
    sizes.measure(pipeline, KEY, template)
    once = len(pipeline.forwards)
    sizes.measure(pipeline, KEY, template)
    assert len(pipeline.forwards) == once
    sizes.measure(pipeline, LARGE, template)
    assert len(pipeline.forwards) == 2 * once


# --- stored on disk


def test_what_was_measured_is_read_back_by_the_next_worker(
    clock: Clock, template: RenderRequest, tmp_path: Path
) -> None:
    path = tmp_path / "there" / "forwards.json"
    ForwardSizes(path).measure(Scripted(clock=clock, seconds=saturating), KEY, template)
    ForwardSizes(path).measure(Scripted(clock=clock, seconds=saturating), LARGE, template)
    later = Scripted(clock=clock, seconds=saturating)
    for key in (KEY, LARGE):
        assert ForwardSizes(path).measure(later, key, template) == 8
    assert later.forwards == []
    assert [kept.name for kept in path.parent.iterdir()] == ["forwards.json"]


def test_other_weights_are_measured_anew(clock: Clock, template: RenderRequest, tmp_path: Path) -> None:
    ForwardSizes(tmp_path / "f.json").measure(Scripted(clock=clock, seconds=saturating), KEY, template)
    other = Scripted(sha256="1" * 64, clock=clock, seconds=saturating)
    ForwardSizes(tmp_path / "f.json").measure(other, KEY, template)
    assert other.forwards


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"KIND": 1}', '{"KIND": {"seconds": {"x": 1}, "most": 1}}', '{"KIND": {}}', "\x00"]
)
def test_a_broken_file_costs_measuring_again_and_is_mended(
    clock: Clock, template: RenderRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    path = tmp_path / "forwards.json"
    ForwardSizes(path).measure(Scripted(clock=clock, seconds=saturating), KEY, template)
    (kind,) = json.loads(path.read_text())
    path.write_text(text.replace("KIND", kind))
    pipeline = Scripted(clock=clock, seconds=saturating)
    assert ForwardSizes(path).measure(pipeline, KEY, template) == 8
    assert pipeline.forwards
    assert "measuring again" in caplog.text
    assert list(json.loads(path.read_text())) == [kind]


def test_a_folder_that_can_not_be_written_costs_nothing_else(
    clock: Clock, template: RenderRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    sizes = ForwardSizes(tmp_path / "file" / "forwards.json")
    assert sizes.measure(Scripted(clock=clock, seconds=saturating), KEY, template) == 8
    assert "can't keep the measured forward sizes" in caplog.text


# --- corrections


def test_rows_that_did_not_fit_after_all_lower_the_best_here_and_on_disk(
    clock: Clock, template: RenderRequest, tmp_path: Path
) -> None:
    pipeline, path = Scripted(clock=clock, seconds=saturating), tmp_path / "forwards.json"
    sizes = ForwardSizes(path)
    sizes.measure(pipeline, KEY, template)
    sizes.shrink(pipeline, KEY, 8)
    assert sizes.measure(pipeline, KEY, template) == 4
    assert ForwardSizes(path).measure(pipeline, KEY, template) == 4
    for _ in range(9):
        sizes.shrink(pipeline, KEY, 1)
    assert sizes.measure(pipeline, KEY, template) == 1


def test_what_is_known_not_to_fit_is_not_tried_when_the_rest_is_measured(
    clock: Clock, template: RenderRequest, tmp_path: Path
) -> None:
    pipeline, path = Scripted(clock=clock, seconds=saturating), tmp_path / "forwards.json"
    ForwardSizes(path).shrink(pipeline, KEY, 6)
    assert ForwardSizes(path).measure(pipeline, KEY, template) == 4
    assert max(pipeline.forwards) == 4


def test_a_forward_that_took_no_time_divides_nothing() -> None:
    assert Curve({1: 0.0, 2: 0.0}).best == 1


# --- filled forwards


@dataclass(frozen=True)
class Compiled(Scripted):
    compiled: bool = True


def test_a_compiled_model_gets_forwards_of_measured_sizes(clock: Clock, template: RenderRequest) -> None:
    pipeline, sizes = Compiled(clock=clock, seconds=saturating), ForwardSizes()
    assert sizes.padded_rows(pipeline, KEY, [template]) is None
    sizes.measure(pipeline, KEY, template)
    assert [sizes.padded_rows(pipeline, KEY, [template] * count) for count in (1, 2, 3, 4, 40)] == [2, 4, 8, 8, 80]


def test_one_that_is_not_gets_them_as_they_are(clock: Clock, template: RenderRequest) -> None:
    pipeline, sizes = Scripted(clock=clock, seconds=saturating), ForwardSizes()
    sizes.measure(pipeline, KEY, template)
    assert sizes.padded_rows(pipeline, KEY, [template] * 3) is None


def test_a_deterministic_forward_always_has_the_same_rows(template: RenderRequest) -> None:
    key, sizes = ForwardKey("tiny", (3, 8, 8), "torch.float32", deterministic=True), ForwardSizes()
    assert sizes.measure(Scripted(), key, template) == FIXED_ROWS
    assert [sizes.padded_rows(Scripted(), key, [template] * count) for count in (1, 4)] == [FIXED_ROWS] * 2

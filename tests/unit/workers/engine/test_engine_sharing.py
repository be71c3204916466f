"""Which requests share a forward in the engine: shapes in turn, urgent requests, measured sizes, fixed bytes."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.gated import SOON, Gated, pixel, request, running
from workers.engine.engine import Engine
from workers.engine.forward_sizes import FIXED_ROWS, ForwardSizes
from workers.pipelines.null import NullPipeline
from workers.render.request import RenderRequest

# --- shapes


def test_shapes_take_turns(engine: Engine, gated: Gated) -> None:
    first = engine.submit(request("first", steps=1))
    gated.begun()
    futures = [engine.submit(request(str(width), width=width)) for width in (64, 128)]
    gated.allow()
    for future in [first, *futures]:
        future.result(SOON)
    assert gated.forwards == [["first"], ["64"], ["128"], ["64"], ["128"]]


def test_another_shape_at_the_head_of_the_line_blocks_no_request(gated: Gated) -> None:
    with running(gated, slots=2, line=4) as engine:
        futures = [engine.submit(request("a", steps=3))]
        gated.begun()
        futures += [engine.submit(request("wide", steps=2, width=128)), engine.submit(request("b", steps=2))]
        gated.allow()
        for future in futures:
            future.result(SOON)
    assert gated.forwards[:3] == [["a"], ["a", "b"], ["a", "b"]]


def test_a_stream_of_others_does_not_starve_another_shape(gated: Gated) -> None:
    with running(gated, slots=2, line=60) as engine:
        futures = [engine.submit(request("first", steps=1))]
        gated.begun()
        futures += [engine.submit(request("0", steps=9)), engine.submit(request("wide", steps=1, width=128))]
        futures += [engine.submit(request(str(number), steps=1)) for number in range(1, 50)]
        gated.allow()
        for future in futures:
            future.result(SOON)
    assert gated.forwards.index(["wide"]) <= 20


# --- urgent requests


def test_an_urgent_request_is_in_the_next_forward_or_the_one_after(gated: Gated) -> None:
    with running(gated, slots=3, line=1) as engine:
        futures = {"a": engine.submit(request("a", steps=3, seed=2))}
        gated.begun()
        futures["b"] = engine.submit(request("b", steps=4, seed=3))
        assert gated.next() == ["a", "b"]
        futures["c"] = engine.submit(request("c", steps=5, seed=4))
        assert gated.next() == ["a", "b", "c"]  # all slots are taken, and one more request fills the line
        futures["d"] = engine.submit(request("d", steps=1, seed=5))
        futures["urgent"] = engine.submit(request("urgent", steps=2, priority=90, width=128, seed=6))
        gated.allow()
        for seed, name in enumerate(futures, start=2):
            assert futures[name].result(SOON).image.getpixel((0, 0)) == pixel(seed)
    assert ["urgent"] in gated.forwards[3:5]
    assert sum("c" in ids for ids in gated.forwards) == 5  # preempted after one forward, it resumed with the other four


# --- measured sizes


def test_a_request_of_another_shape_may_arrive_while_forwards_are_measured() -> None:
    measuring, measured = threading.Event(), threading.Event()

    class Slow(ForwardSizes):
        def _best_rows(self, *args: Any) -> int:
            measuring.set()
            assert measured.wait(SOON)
            return 4

    with running(NullPipeline(), sizes=Slow()) as engine:
        futures = [engine.submit(request("a"))]
        assert measuring.wait(SOON)
        futures.append(engine.submit(request("wide", width=128, seed=2)))
        measured.set()
        assert [future.result(SOON).image.getpixel((0, 0)) for future in futures] == [pixel(1), pixel(2)]
        assert engine.failed is None


@dataclass(frozen=True)
class Recording(NullPipeline):
    """A null pipeline that records its forwards; with `by_place`, outputs depend on the place of their row."""

    forwards: list[tuple[list[str], int | None]] = field(default_factory=list)
    by_place: bool = False

    def denoise(self, requests: Sequence[RenderRequest], rows: int | None = None) -> torch.Tensor:
        self.forwards.append(([one.id for one in requests], rows))
        outputs = super().denoise(requests)
        if self.by_place:
            outputs += 1e-7 * torch.arange(len(requests)).view(-1, 1, 1, 1)
        return outputs


def measuring_sizes(sizes: ForwardSizes, most: int) -> ForwardSizes:
    sizes._best_rows = lambda *_: most  # type: ignore[method-assign]
    return sizes


def test_no_forward_has_more_rows_than_was_measured_to_be_best(gated: Gated) -> None:
    sizes = measuring_sizes(ForwardSizes(), most=2)
    with running(gated, slots=8, line=8, sizes=sizes) as engine:
        futures = [engine.submit(request("0", steps=1))]
        gated.begun()
        futures += [engine.submit(request(str(number), steps=2)) for number in range(1, 6)]
        gated.allow()
        for future in futures:
            future.result(SOON)
        assert engine.slots == 2
    assert max(len(ids) for ids in gated.forwards) == 2


def test_a_request_larger_than_the_best_forward_has_one_of_its_own(gated: Gated) -> None:
    gated.rows = {"a": 2, "b": 2}
    with running(gated, slots=8, line=8, sizes=measuring_sizes(ForwardSizes(), most=1)) as engine:
        futures = [engine.submit(request(name, steps=1)) for name in "ab"]
        gated.allow()
        for future in futures:
            future.result(SOON)
    assert gated.forwards == [["a"], ["b"]]


# --- fixed bytes


def rendered_together(pipeline: Recording, *requests: RenderRequest, **options: Any) -> list[list[str]]:
    """Render the requests together; returns the ids in each forward, except those of forwards that were measured."""
    with running(pipeline, slots=8, line=8, **options) as engine:
        with engine._changed:  # the loop can't begin before all of them are in line
            futures = [engine.submit(one) for one in requests]
        for future in futures:
            future.result(SOON)
    return [ids for ids, rows in pipeline.forwards if len(ids) != FIXED_ROWS]


def test_deterministic_requests_share_forwards_of_fixed_rows_and_never_with_others() -> None:
    pipeline = Recording()
    shared = rendered_together(
        pipeline,
        request("a"),
        request("fixed", deterministic=True),
        request("b"),
        request("fixed too", deterministic=True, seed=2),
    )
    assert sorted(shared) == sorted([["a", "b"], ["fixed", "fixed too"]] * 2)
    for ids, rows in pipeline.forwards:
        assert rows == (FIXED_ROWS if "fixed" in ids else None)


def test_where_a_row_depends_on_its_place_a_deterministic_request_is_alone() -> None:
    pipeline = Recording(by_place=True)
    shared = rendered_together(
        pipeline, request("a", deterministic=True), request("b", deterministic=True), request("c"), request("d")
    )
    assert sorted(shared) == sorted([["a"]] * 2 + [["b"]] * 2 + [["c", "d"]] * 2)


def test_a_deterministic_engine_takes_every_request_as_such() -> None:
    pipeline = Recording()
    assert rendered_together(pipeline, request("a"), request("b"), deterministic=True) == [["a", "b"]] * 2
    assert {rows for _, rows in pipeline.forwards} == {FIXED_ROWS}


def test_a_fixed_forward_that_can_not_be_measured_is_one_requests_own(gated: Gated) -> None:
    gated.most_rows = 4  # of eight
    gated.allow()
    with running(gated) as engine:
        engine.submit(request("a", deterministic=True)).result(SOON)
    assert gated.filled == [FIXED_ROWS, None, None]

"""Slots, the line, and turns between forwards."""

from itertools import pairwise

import pytest

from workers.engine.step_scheduler import ForwardKey, StepScheduler

SMALL = ForwardKey("tiny", (4, 8, 8), "float32")
LARGE = ForwardKey("tiny", (4, 16, 16), "float32")
OTHER = ForwardKey("sd15", (4, 8, 8), "float32")


def scheduler(slots: int = 2, line: int = 4, **requests: ForwardKey) -> StepScheduler:
    """Return a step scheduler with these requests in line."""
    made = StepScheduler(slots, line)
    for request_id, key in requests.items():
        made.enqueue(request_id, key)
    return made


def test_slots_go_to_the_head_of_the_line() -> None:
    line = scheduler(slots=2, a=SMALL, b=SMALL, c=SMALL)
    assert line.admit() == ("a", "b")
    assert line.running == ("a", "b")
    assert line.waiting == ("c",)


def test_no_request_is_admitted_while_all_slots_are_taken() -> None:
    line = scheduler(slots=1, a=SMALL, b=SMALL)
    line.admit()
    assert line.admit() == ()
    line.remove("a")
    assert line.admit() == ("b",)


def test_requests_of_one_key_share_a_forward() -> None:
    line = scheduler(slots=3, a=SMALL, b=SMALL, c=SMALL)
    line.admit()
    assert line.next_forward() == ("a", "b", "c")


def test_a_request_in_line_is_in_no_forward() -> None:
    line = scheduler(slots=1, a=SMALL, b=SMALL)
    assert line.next_forward() == ()
    line.admit()
    assert line.next_forward() == ("a",)


@pytest.mark.parametrize("other", [LARGE, OTHER, ForwardKey("tiny", (4, 8, 8), "float16")])
def test_another_shape_model_or_dtype_is_another_forward(other: ForwardKey) -> None:
    line = scheduler(a=SMALL, b=other)
    line.admit()
    assert line.next_forward() == ("a",)
    assert line.next_forward() == ("b",)


def test_keys_take_turns_however_many_requests_each_has() -> None:
    line = scheduler(slots=4, a=SMALL, b=SMALL, c=SMALL, d=LARGE)
    line.admit()
    turns = [line.next_forward() for _ in range(4)]
    assert turns == [("a", "b", "c"), ("d",)] * 2


def test_no_key_waits_for_more_than_one_forward_of_each_other() -> None:
    # Small requests arrive all the time; each takes two forwards.
    line = scheduler(slots=3, line=100, a=SMALL, big=LARGE, other=OTHER)
    served: list[str] = []
    forwards: dict[str, int] = {}
    for turn in range(30):
        line.enqueue(f"s{turn}", SMALL)
        line.admit()
        ids = line.next_forward()
        served.append("small" if set(ids) - {"big", "other"} else ids[0])
        for request_id in ids:
            forwards[request_id] = forwards.get(request_id, 0) + 1
            if forwards[request_id] == 2 and request_id not in ("big", "other"):
                line.remove(request_id)
    for key in ("big", "other", "small"):
        places = [place for place, name in enumerate(served) if name == key]
        assert max(after - before for before, after in pairwise(places)) <= 3


def test_a_request_that_joins_shares_the_next_forward_of_its_key() -> None:
    line = scheduler(slots=3, a=SMALL)
    line.admit()
    assert line.next_forward() == ("a",)
    line.enqueue("b", SMALL)
    line.admit()
    assert line.next_forward() == ("a", "b")


def test_a_key_that_comes_new_waits_for_those_here_to_have_their_turn() -> None:
    line = scheduler(slots=3, a=SMALL, b=LARGE)
    line.admit()
    line.next_forward()
    line.enqueue("c", OTHER)
    line.admit()
    assert [line.next_forward() for _ in range(3)] == [("b",), ("a",), ("c",)]


def test_a_request_that_left_is_in_no_forward() -> None:
    line = scheduler(slots=2, a=SMALL, b=SMALL)
    line.admit()
    line.remove("a")
    assert line.next_forward() == ("b",)
    line.remove("b")
    assert line.next_forward() == ()
    assert line.running == ()


def test_a_request_may_leave_the_line_before_it_had_a_slot() -> None:
    line = scheduler(slots=1, a=SMALL, b=SMALL, c=SMALL)
    line.admit()
    line.remove("b")
    line.remove("a")
    assert line.admit() == ("c",)


def test_leaving_twice_does_nothing() -> None:
    line = scheduler(slots=1, a=SMALL)
    line.admit()
    line.remove("a")
    line.remove("a")
    line.remove("never here")
    assert line.running == line.waiting == ()


def test_the_line_is_bounded() -> None:
    line = scheduler(slots=1, line=2, a=SMALL, b=SMALL)
    assert line.full
    with pytest.raises(ValueError, match="full"):
        line.enqueue("c", SMALL)
    line.admit()
    assert not line.full
    line.enqueue("c", SMALL)
    assert line.waiting == ("b", "c")


def test_an_id_is_here_once() -> None:
    line = scheduler(a=SMALL)
    with pytest.raises(ValueError, match="a is here already"):
        line.enqueue("a", SMALL)
    line.admit()
    with pytest.raises(ValueError, match="a is here already"):
        line.enqueue("a", LARGE)
    line.remove("a")
    line.enqueue("a", LARGE)


@pytest.mark.parametrize(("slots", "line"), [(0, 1), (1, 0)])
def test_no_slots_or_no_line_is_refused(slots: int, line: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        StepScheduler(slots, line)

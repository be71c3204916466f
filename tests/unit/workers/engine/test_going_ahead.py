"""Which requests may go ahead of others: priorities, full forwards, and urgent requests."""

import random
from collections import Counter
from typing import Any

import pytest

from workers.engine.step_scheduler import ForwardKey, StepScheduler

SMALL = ForwardKey("tiny", (4, 8, 8), "float32")
LARGE = ForwardKey("tiny", (4, 16, 16), "float32")
OTHER = ForwardKey("sd15", (4, 8, 8), "float32")


def scheduler(slots: int = 2, line: int = 4, most_rows: int = 2**31, **requests: ForwardKey) -> StepScheduler:
    """Return a step scheduler with these requests in line."""
    made = StepScheduler(slots, line, most_rows=lambda _: most_rows)
    for request_id, key in requests.items():
        made.enqueue(request_id, key)
    return made


# --- priorities


def test_the_line_is_served_by_priority_and_then_first_come_first_served() -> None:
    line = scheduler(slots=1, line=9)
    for request_id, priority in {"a": 10, "b": 50, "c": 10, "d": 89, "e": 50}.items():
        line.enqueue(request_id, SMALL, priority=priority)
    served = []
    while admitted := line.admit():
        served += admitted
        line.remove(admitted[0])
    assert served == ["d", "b", "e", "a", "c"]


def test_priority_goes_before_what_could_join_a_forward() -> None:
    line = scheduler(slots=2, a=SMALL)
    line.admit()
    line.enqueue("joins", SMALL, priority=10)
    line.enqueue("opens", LARGE, priority=20)
    assert line.admit() == ("opens",)


# --- going ahead


def test_a_request_that_can_join_a_running_forward_goes_ahead_of_one_that_opens_another() -> None:
    line = scheduler(slots=2, a=SMALL, b=LARGE, c=SMALL)
    assert line.admit() == ("a", "c")
    line.remove("a")
    assert line.admit() == ("b",)


def test_a_request_is_passed_so_many_times_and_no_more() -> None:
    line = StepScheduler(2, 100, skips=3)
    line.enqueue("first", SMALL)
    line.admit()
    line.enqueue("large", LARGE)
    for turn in range(9):
        line.enqueue(f"s{turn}", SMALL)
    admitted: list[str] = []
    while "large" not in admitted:
        admitted += line.admit()
        line.remove(line.running[-1])
    assert admitted == ["s0", "s1", "s2", "large"]


# --- rows


def test_a_key_has_no_more_rows_running_than_a_forward_takes() -> None:
    line = scheduler(slots=9, line=9, most_rows=4)
    for name in "abc":
        line.enqueue(name, SMALL, rows=2)
    assert line.admit() == ("a", "b")
    line.remove("a")
    assert line.admit() == ("c",)


def test_a_request_larger_than_a_forward_runs_alone() -> None:
    line = scheduler(slots=9, most_rows=1)
    line.enqueue("a", SMALL, rows=2)
    line.enqueue("b", SMALL, rows=2)
    assert line.admit() == ("a",)
    line.remove("a")
    assert line.admit() == ("b",)


def test_a_request_whose_forward_is_full_does_not_block_another_key() -> None:
    line = scheduler(slots=3, most_rows=1, a=SMALL, b=SMALL, c=LARGE)
    assert line.admit() == ("a", "c")
    assert line.waiting == ("b",)


def test_small_requests_do_not_starve_a_larger_one_of_their_key() -> None:
    line = scheduler(slots=9, line=9, most_rows=4)
    for name in "abcd":
        line.enqueue(name, SMALL)
    line.admit()
    line.enqueue("guided", SMALL, rows=2)
    line.enqueue("e", SMALL)
    line.remove("a")
    assert line.admit() == ()  # one row is free, but e must not take it before guided
    line.remove("b")
    assert line.admit() == ("guided",)


# --- urgent requests


def test_an_urgent_request_takes_the_slot_of_the_lowest_priority_that_came_last() -> None:
    line = scheduler(slots=3)
    for name, priority in {"a": 20, "b": 10, "c": 10}.items():
        line.enqueue(name, SMALL, priority=priority)
    line.admit()
    line.enqueue("urgent", LARGE, priority=90)
    assert line.admit() == ("urgent",)
    assert line.waiting == ("c",)
    assert line.running == ("a", "b", "urgent")


def test_an_urgent_request_preempts_its_own_key_before_another_of_the_same_priority() -> None:
    line = scheduler(slots=2, a=SMALL, b=SMALL)
    line.admit()
    line.remove("b")
    line.enqueue("c", LARGE)
    line.admit()
    line.enqueue("urgent", SMALL, priority=90)
    line.admit()
    assert line.waiting == ("a",)


def test_an_urgent_request_neither_waits_for_room_in_line_nor_takes_it() -> None:
    line = scheduler(slots=1, line=1, a=SMALL)
    line.admit()
    line.enqueue("b", SMALL)
    assert line.full
    line.enqueue("urgent", SMALL, priority=90)
    line.admit()
    assert line.waiting == ("a", "b")
    assert line.full
    line.remove("b")
    assert not line.full  # a was preempted, and does not count


def test_an_urgent_request_waits_only_for_other_urgent_ones() -> None:
    line = scheduler(slots=1)
    line.enqueue("first", SMALL, priority=95)
    line.admit()
    line.enqueue("second", SMALL, priority=100)
    assert line.admit() == ()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
def test_room_for_its_rows_is_made_in_its_own_key(rows: int) -> None:
    line = scheduler(slots=9, line=9, most_rows=4)
    for name in "abcd":
        line.enqueue(name, SMALL)
    line.enqueue("other", LARGE, priority=1)
    line.admit()
    line.enqueue("urgent", SMALL, rows=rows, priority=90)
    assert line.admit() == ("urgent",)
    assert set(line.running) == {"urgent", "other", *"abcd"[: max(0, 4 - rows)]}
    assert line.waiting == tuple("abcd"[max(0, 4 - rows) :])


def test_a_preempted_request_resumes_before_others_of_its_priority() -> None:
    line = scheduler(slots=2, line=9, a=SMALL, b=LARGE)
    line.admit()
    for name in "cd":
        line.enqueue(name, SMALL)
    for name in ("u1", "u2"):
        line.enqueue(name, SMALL, priority=90)
    assert line.admit() == ("u1", "u2")
    assert line.waiting == ("b", "a", "c", "d")
    line.remove("u1")
    assert line.admit() == ("b",)  # b opens a key, yet no other request goes ahead of it
    line.remove("u2")
    assert line.admit() == ("a",)


def test_an_urgent_request_has_the_next_turn_or_the_one_after() -> None:
    line = StepScheduler(5, 5)
    keys = [ForwardKey(name, (4, 8, 8), "float32") for name in "abcd"]
    for key in keys:
        line.enqueue(key.model, key)
    line.admit()
    line.enqueue("urgent", SMALL, priority=90)
    line.admit()
    assert [line.next_forward() for _ in range(5)] == [("a",), ("urgent",), ("b",), ("c",), ("d",)]


def test_a_stream_of_urgent_requests_leaves_every_other_turn_to_the_rest() -> None:
    line = scheduler(slots=4, a=SMALL, b=LARGE)
    line.admit()
    turns = []
    for turn in range(8):
        line.enqueue(f"u{turn}", OTHER, priority=90)
        line.admit()
        turns.append(line.next_forward()[0])
        if turns[-1].startswith("u"):
            for request_id in line.running:
                if request_id.startswith("u"):
                    line.remove(request_id)
    assert [name for name in turns if name in "ab"] == ["a", "b", "a", "b"]


# --- random sequences


@pytest.mark.parametrize("seed", range(40))
def test_no_request_starves_and_no_bound_is_exceeded_in_random_sequences(seed: int) -> None:
    chance = random.Random(seed)
    keys = [SMALL, LARGE, OTHER][: chance.randint(1, 3)]
    most = {key: chance.choice([1, 2, 4, 8]) for key in keys}
    skips = chance.randint(0, 4)
    line = StepScheduler(chance.randint(1, 6), chance.randint(1, 12), skips=skips, most_rows=lambda key: most[key])
    came: dict[str, dict[str, Any]] = {}
    left_to_do: dict[str, int] = {}
    passed: Counter[str] = Counter()
    began: set[str] = set()

    for turn in range(600):
        if turn < 300 and chance.random() < 0.8 and not line.full:
            request_id, key = f"r{len(came)}", chance.choice(keys)
            came[request_id] = {"key": key, "rows": chance.choice([1, 1, 2]), "priority": chance.choice([10, 50, 95])}
            left_to_do[request_id] = chance.randint(1, 5)
            line.enqueue(request_id, **came[request_id])
        place = {each: -1 if each in began else number for number, each in enumerate(came)}
        admitted = line.admit()

        assert len(line.running) <= line.slots
        for key in keys:
            own = [came[each]["rows"] for each in line.running if came[each]["key"] == key]
            assert sum(own) <= most[key] or len(own) == 1
        for each in line.waiting:
            mine = came[each]
            ahead = [
                other
                for other in admitted
                if (-came[other]["priority"], place[other]) > (-mine["priority"], place[each])
            ]
            assert all(came[other]["key"] != mine["key"] for other in ahead)
            beside = [came[other]["rows"] for other in line.running if came[other]["key"] == mine["key"]]
            is_next = each == next(other for other in line.waiting if came[other]["key"] == mine["key"])
            if is_next and (not beside or sum(beside) + mine["rows"] <= most[mine["key"]]):
                assert all(came[other]["priority"] == mine["priority"] for other in ahead)
                assert not ahead or each not in began
                passed[each] += len(ahead)
                assert passed[each] <= skips
        if line.waiting:
            assert line.running
        began.update(admitted)

        for each in line.next_forward():
            left_to_do[each] -= 1
            if not left_to_do[each]:
                line.remove(each)
        if chance.random() < 0.02 and line.waiting:
            gone = chance.choice(line.waiting)
            left_to_do[gone] = 0
            line.remove(gone)

    assert len(came) > 20
    assert not any(left_to_do.values())
    assert line.running == line.waiting == ()

"""The order of dispatch: worked examples, and bounds that hold for any load."""

from collections import Counter
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.jobs.fair_share import LEAST_WINDOW, FairLine, Owner, Share, window

STARVATION_SECONDS = 300.0


def line(shares: Iterable[Share], owners: Iterable[Owner] = ()) -> FairLine:
    shares = list(shares)
    known = {owner.name: owner for owner in owners}
    everybody = [known.get(name) or Owner(name) for name in {share.owner: None for share in shares}]
    return FairLine(shares, everybody, starvation_seconds=STARVATION_SECONDS)


def served(shares: Iterable[Share], count: int, owners: Iterable[Owner] = ()) -> str:
    return "".join(job.batch_id for job in line(shares, owners).take(count))


def test_batches_of_one_owner_take_turns() -> None:
    assert served([Share("a", "me", 50), Share("b", "me", 50)], 6) == "ababab"


def test_a_higher_priority_is_served_first_whatever_was_served_before() -> None:
    assert served([Share("a", "me", 10), Share("b", "me", 90, virtual_time=1e6)], 3) == "bbb"


def test_owners_share_evenly_however_many_batches_each_has() -> None:
    shares = [Share(name, "many", 50) for name in "abc"] + [Share("z", "one", 50)]
    assert Counter(served(shares, 12))["z"] == 6


def test_a_double_weight_gets_twice_the_device_seconds() -> None:
    shares = [Share("a", "me", 50), Share("b", "you", 50)]
    assert Counter(served(shares, 30, [Owner("you", weight=2.0)])) == {"a": 10, "b": 20}
    assert Counter(served([Share("a", "me", 50), Share("b", "me", 50, weight=2.0)], 30)) == {"a": 10, "b": 20}


def test_jobs_that_cost_three_times_as_much_get_a_third_of_the_turns() -> None:
    shares = [Share("a", "me", 50, seconds=3.0), Share("b", "you", 50, seconds=1.0)]
    assert Counter(served(shares, 40)) == {"a": 10, "b": 30}


def test_a_new_owner_starts_where_the_others_stand_and_has_no_credit() -> None:
    old = Share("a", "old", 50, virtual_time=1000.0, in_flight=1)
    assert served([old, Share("b", "new", 50)], 6, [Owner("old", virtual_time=1000.0)]) == "bababa"


def test_a_batch_that_comes_back_has_no_credit_for_the_time_it_was_paused() -> None:
    shares = [Share("a", "me", 50, virtual_time=900.0, in_flight=2), Share("b", "me", 50, virtual_time=10.0)]
    assert Counter(served(shares, 20))["b"] == 11


def test_a_new_batch_has_no_credit_while_nothing_is_in_flight() -> None:
    shares = [Share("a", "me", 50, virtual_time=900.0), Share("b", "me", 50)]
    assert served(shares, 4) == "baba"


def test_who_waits_while_a_higher_priority_is_served_keeps_what_is_due() -> None:
    shares = [
        Share("h", "me", 90, virtual_time=500.0, in_flight=4),
        Share("a", "me", 50, virtual_time=5.0),
        Share("b", "me", 50, virtual_time=2.0),
    ]
    found = line(shares)
    assert {share.batch_id: share.virtual_time for share in found.shares.values()} == {"h": 500.0, "a": 5.0, "b": 2.0}


def test_a_batch_that_would_starve_gets_one_job_among_the_highest() -> None:
    shares = [Share("h", "me", 90), Share("a", "you", 5, unserved_seconds=301.0)]
    jobs = line(shares).take(4)
    assert [(job.batch_id, job.priority) for job in jobs] == [("a", 90), ("h", 90), ("h", 90), ("h", 90)]


def test_an_owner_at_the_cap_is_passed_over() -> None:
    shares = [Share("a", "me", 90), Share("b", "you", 5)]
    assert served(shares, 5, [Owner("me", room=2)]) == "aabbb"
    assert served([Share("a", "me", 90, unserved_seconds=999.0)], 5, [Owner("me", room=0)]) == ""


def test_a_refunded_charge_goes_to_the_other_batches() -> None:
    found = line([Share("a", "me", 50), Share("b", "you", 50)])
    first = found.take(4)
    for job in first:
        if job.batch_id == "a":
            found.give_back(job)
    assert found.owners["me"].virtual_time == 0
    assert [job.batch_id for job in found.take(3)] == ["b", "b", "b"]
    assert found.shares["b"].virtual_time == 5


names = st.sampled_from("abcdefgh")
weights = st.sampled_from([0.5, 1.0, 2.0, 5.0])
costs = st.floats(0.1, 20.0)
loads = st.dictionaries(names, st.tuples(st.sampled_from("xyz"), weights, costs), min_size=2)


@given(loads, st.integers(20, 120), st.integers(1, 12))
def test_device_seconds_never_drift_apart_by_more_than_a_job_of_each(
    load: dict[str, tuple[str, float, float]], jobs: int, at_once: int
) -> None:
    # The bound of start-time fair queueing: |W_i/w_i - W_j/w_j| <= c_i/w_i + c_j/w_j while both have work.
    shares = [Share(name, owner, 50, weight, seconds=seconds) for name, (owner, weight, seconds) in load.items()]
    owners = [Owner(name) for name in {share.owner: None for share in shares}]
    got: Counter[str] = Counter()
    in_flight: list[str] = []
    while got.total() < jobs:
        in_flight += [job.batch_id for job in FairLine(shares, owners, starvation_seconds=300).take(at_once)]
        got.update(in_flight[-at_once:])
        del in_flight[: len(in_flight) - 2 * at_once + 1]
        for share in shares:
            share.in_flight = in_flight.count(share.batch_id)
    largest = {owner.name: max(share.seconds for share in shares if share.owner == owner.name) for owner in owners}
    seconds: Counter[str] = Counter()
    for share in shares:
        seconds[share.owner] += got[share.batch_id] * share.seconds  # type: ignore[assignment]
    for a in owners:
        for b in owners:
            assert abs(seconds[a.name] - seconds[b.name]) <= largest[a.name] + largest[b.name] + 1e-6
    for one in shares:
        for other in shares:
            if one.owner == other.owner:
                a_job, another = one.seconds / one.weight, other.seconds / other.weight
                apart = got[one.batch_id] * a_job - got[other.batch_id] * another
                assert abs(apart) <= a_job + another + 1e-6


shares_of_any_kind = st.lists(
    st.builds(
        Share,
        batch_id=st.uuids().map(str),
        owner=st.sampled_from("xyz"),
        priority=st.integers(0, 100),
        weight=weights,
        virtual_time=st.floats(0, 1e6),
        seconds=costs,
        in_flight=st.integers(0, 5),
        unserved_seconds=st.sampled_from([0.0, 10.0, 400.0]),
    ),
    max_size=12,
    unique_by=lambda share: share.batch_id,
)


@given(shares_of_any_kind, st.integers(0, 40))
def test_a_pass_fills_its_room_starves_nobody_and_keeps_to_the_priorities(shares: list[Share], room: int) -> None:
    jobs = line(shares).take(room)
    assert len(jobs) == (room if shares else 0)
    starving = [share.batch_id for share in shares if share.unserved_seconds >= STARVATION_SECONDS]
    assert len({job.batch_id for job in jobs} & set(starving)) == min(room, len(starving))
    priorities = {share.batch_id: share.priority for share in shares}
    following: Sequence[int] = [priorities[job.batch_id] for job in jobs[len(starving) :]]
    assert set(following) <= {max(priorities.values(), default=0)}


@given(shares_of_any_kind, st.dictionaries(st.sampled_from("xyz"), st.integers(0, 10)), st.integers(0, 60))
def test_no_owner_gets_more_than_the_cap(shares: list[Share], rooms: dict[str, int], count: int) -> None:
    jobs = line(shares, [Owner(name, room=room) for name, room in rooms.items()]).take(count)
    owner = {share.batch_id: share.owner for share in shares}
    got = Counter(owner[job.batch_id] for job in jobs)
    assert all(got[name] <= room for name, room in rooms.items())


@pytest.mark.parametrize(
    ("slots", "most", "expected"), [(0, 128, LEAST_WINDOW), (1, 128, LEAST_WINDOW), (16, 128, 32), (16, 3, 3)]
)
def test_the_window_is_twice_the_slots(slots: int, most: int, expected: int) -> None:
    assert window(slots, most) == expected

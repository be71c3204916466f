"""The mapping of a job's priority to Redis' priority steps."""

from itertools import pairwise

from farm.queue.broker import URGENT_STEP, priority_step
from farm.specs.spec import URGENT


def test_urgent_jobs_and_no_others_have_the_first_step() -> None:
    assert {priority for priority in range(101) if priority_step(priority) == URGENT_STEP} == set(range(URGENT, 101))


def test_the_others_spread_over_all_other_steps() -> None:
    assert {priority_step(priority) for priority in range(URGENT)} == set(range(1, 10))


def test_a_higher_priority_is_never_served_later() -> None:
    steps = [priority_step(priority) for priority in range(101)]
    assert all(sooner <= later for later, sooner in pairwise(steps))

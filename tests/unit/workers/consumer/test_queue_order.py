import json
from collections import Counter

import pytest
from kombu.utils.json import dumps

from farm.queue.broker import make_app
from farm.settings import Settings
from workers.consumer.queue_order import HeldFirst


def take(cycle, waiting: Counter[str]) -> str:
    """Take a message as kombu does: from the first queue in the cycle's order that has one."""
    queue = next(queue for queue in cycle.consume(len(cycle.items)) if waiting[queue])
    waiting[queue] -= 1
    cycle.rotate(queue)
    return queue.removeprefix("render.")


@pytest.fixture
def held() -> list[str]:
    """The worker's loaded models, most recently used first."""
    return ["c"]


@pytest.fixture
def failed() -> list[str]:
    return []


@pytest.fixture
def cycle(held: list[str], failed: list[str]):
    cycle = HeldFirst(lambda: held, lambda: failed, rounds=4)()
    cycle.update(["render.a", "render.b", "render.c", "render.d"])
    return cycle


def order(cycle) -> str:
    return "".join(queue.removeprefix("render.") for queue in cycle.consume(4))


def test_the_queue_of_a_held_model_comes_first(cycle) -> None:
    assert order(cycle) == "cabd"


def test_an_evicted_model_loses_its_place_at_once(cycle, held: list[str]) -> None:
    held[:] = ["d"]
    assert order(cycle) == "dabc"


def test_with_no_model_held_every_queue_has_its_turn_when_the_one_before_is_empty() -> None:
    cycle = HeldFirst(list)()
    cycle.update(["render.a", "render.b", "render.c", "render.d"])
    waiting = Counter({f"render.{model}": 2 for model in "abcd"})
    assert [take(cycle, waiting) for _ in range(8)] == list("aabbccdd")


def test_held_models_take_turns(cycle, held: list[str]) -> None:
    held.append("a")
    waiting = Counter({"render.a": 2, "render.c": 2})
    assert [take(cycle, waiting) for _ in range(4)] == ["a", "c", "a", "c"]


def test_a_model_that_is_not_held_goes_first_once_in_so_many_rounds_and_they_take_turns(cycle, held: list[str]) -> None:
    waiting = Counter({f"render.{model}": 100 for model in "abcd"})
    taken = ""
    for _ in range(16):
        taken += take(cycle, waiting)
        held[:] = taken[-1]  # replaces the other model
    assert taken == "cccaaaabbbbddddc"


def test_a_model_that_is_not_held_is_served_at_once_when_the_held_ones_have_no_jobs(cycle) -> None:
    assert take(cycle, Counter({"render.b": 1})) == "b"


def test_a_model_on_its_way_in_is_next_until_it_is_held_and_goes_before_the_one_that_it_replaces(
    cycle, held: list[str]
) -> None:
    held[:] = ["d", "c"]
    assert take(cycle, Counter({"render.b": 1})) == "b"
    assert order(cycle) == "dbca"
    held[:] = ["b", "d"]
    assert order(cycle) == "dbac"


def test_a_model_that_can_not_be_loaded_is_not_on_its_way_in(cycle, failed: list[str]) -> None:
    assert take(cycle, Counter({"render.b": 1})) == "b"
    failed.append("b")
    assert order(cycle) == "cadb"


def test_an_unused_turn_of_the_others_is_no_credit(cycle, failed: list[str]) -> None:
    failed.append("a")
    waiting = Counter({"render.c": 100})
    for _ in range(8):
        take(cycle, waiting)
    waiting["render.a"] = 100
    assert "".join(take(cycle, waiting) for _ in range(8)) == "cccaccca"


def test_each_channel_has_an_order_of_its_own() -> None:
    strategy = HeldFirst(list)
    first, second = strategy(), strategy()
    first.update(["render.a"])
    assert second.consume(1) == []


def test_the_options_of_a_connection_with_it_can_still_be_sent_to_flower() -> None:
    app = make_app(Settings(database_url="sqlite://", broker_url="redis://localhost:1/0", s3_bucket="farm"))
    app.conf.broker_transport_options = {
        **app.conf.broker_transport_options,
        "queue_order_strategy": HeldFirst(lambda: ["a"]),
    }
    with app.connection_for_read() as connection:
        sent = json.loads(dumps(connection.info()))
    assert sent["transport_options"]["queue_order_strategy"] == "HeldFirst"

"""Whose message a worker takes next from a real Valkey, through kombu's own transport."""

from collections.abc import Collection

import pytest
from kombu import Consumer, Queue

from farm.broker import Broker, Doorbell, make_app, queue_name
from farm.settings import Settings
from workers.consumption import HeldFirst


@pytest.fixture
def settings(valkey: str) -> Settings:
    """No database and no bucket: messages are all there is."""
    return Settings.load(database_url="sqlite://", broker_url=valkey, s3_bucket="farm")


def ring(settings: Settings, *jobs: tuple[str, int]) -> None:
    """Publish a doorbell for each (model, priority)."""
    broker = Broker(settings)
    broker.publish(Doorbell(f"{model}-{n}", model, priority, model) for n, (model, priority) in enumerate(jobs))
    broker.close()


def taken(settings: Settings, held: Collection[str], count: int, rounds: int = 32) -> str:
    """The models whose messages a worker of a, b and c takes, one at a time."""
    app = make_app(settings)
    app.conf.broker_transport_options["queue_order_strategy"] = HeldFirst(lambda: held, rounds)
    models: list[str] = []

    def receive(_: object, message) -> None:
        models.append(message.headers["argsrepr"][2])
        message.ack()

    with app.connection_for_read() as connection:
        channel = connection.channel()
        queues = [Queue(queue_name(model), channel=channel) for model in "abc"]
        with Consumer(channel, queues, callbacks=[receive], accept=["json"], prefetch_count=1):
            while len(models) < count:
                connection.drain_events(timeout=20)
    app.close()
    return "".join(models)


def test_messages_of_held_models_are_taken_first(settings: Settings) -> None:
    ring(settings, *[("a", 50), ("b", 50), ("c", 50)] * 2)
    assert taken(settings, {"c"}, 6) == "ccabab"


def test_an_urgent_message_of_a_model_that_is_not_held_goes_before_all(settings: Settings) -> None:
    ring(settings, ("c", 50), ("c", 50), ("a", 100))
    assert taken(settings, {"c"}, 3) == "acc"


def test_messages_of_models_that_are_not_held_do_not_starve(settings: Settings) -> None:
    ring(settings, *[("c", 50)] * 8, ("a", 50), ("b", 50))
    assert taken(settings, {"c"}, 10, rounds=4) == "cccacccbcc"

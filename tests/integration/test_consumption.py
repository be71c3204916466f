"""The order in which a worker takes messages from a real Valkey, through kombu's own transport."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
import redis
from kombu import Consumer, Queue

from farm.jobs.records import Doorbell
from farm.queue.broker import Broker, make_app, queue_name
from farm.settings import Settings
from workers.consumer.queue_order import HeldFirst, UrgentConsumer


@pytest.fixture
def settings(valkey: str) -> Settings:
    """Settings without a database and a bucket: these tests use messages only."""
    return Settings.load(database_url="sqlite://", broker_url=valkey, s3_bucket="farm")


def ring(settings: Settings, *jobs: tuple[str, int]) -> None:
    """Publish a doorbell for each (model, priority)."""
    broker = Broker(settings)
    broker.publish(Doorbell(f"{model}-{n}", model, priority, model) for n, (model, priority) in enumerate(jobs))
    broker.close()


def taken(settings: Settings, held: Sequence[str], count: int, rounds: int = 32) -> str:
    """The models whose messages a worker of a, b and c takes, one at a time."""
    app = make_app(settings)
    app.conf.broker_transport_options["queue_order_strategy"] = HeldFirst(lambda: held, rounds=rounds)
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
    assert taken(settings, ["c"], 6) == "ccaabb"


def test_an_urgent_message_of_a_model_that_is_not_held_goes_before_all(settings: Settings) -> None:
    ring(settings, ("c", 50), ("c", 50), ("a", 100))
    assert taken(settings, ["c"], 3) == "acc"


def test_messages_of_models_that_are_not_held_do_not_starve(settings: Settings) -> None:
    ring(settings, *[("c", 50)] * 8, ("a", 50), ("b", 50))
    assert taken(settings, ["c"], 10, rounds=4) == "cccacccbcc"


@pytest.fixture
def urgent(settings: Settings) -> Iterator[UrgentConsumer]:
    """The urgent consumer of a worker of a and b, without the rest of Celery. It leaves messages unacknowledged."""
    app = make_app(settings)
    app.amqp.queues.select([queue_name("a"), queue_name("b")])
    with app.connection_for_read() as ordinary:
        celery = SimpleNamespace(
            app=app,
            connect=app.connection_for_read,
            task_consumer=app.amqp.TaskConsumer(ordinary.default_channel),
            create_task_handler=lambda: lambda _: None,
            on_decode_error=None,
            pool=SimpleNamespace(limit=1),
        )
        step = UrgentConsumer(celery)
        step.start(celery)
        yield step
        step.stop(celery)
    app.close()


def test_the_urgent_consumer_takes_urgent_messages_and_no_others(settings: Settings, urgent: UrgentConsumer) -> None:
    ring(settings, ("a", 89), ("b", 90), ("a", 0), ("a", 100))
    for _ in range(2):
        urgent._connection.drain_events(timeout=20)
    with pytest.raises(TimeoutError):
        urgent._connection.drain_events(timeout=0.1)
    broker = Broker(settings)
    assert broker.waiting("a") == {"a-0", "a-2"}
    assert broker.waiting("b") == set()
    broker.close()


def test_a_message_that_the_urgent_consumer_puts_back_for_a_dead_worker_does_not_become_urgent(
    settings: Settings, urgent: UrgentConsumer
) -> None:
    ring(settings, ("a", 50))
    with make_app(settings).connection_for_read() as dead, redis.Redis.from_url(settings.broker_url) as client:
        channel = dead.default_channel
        with Consumer(channel, Queue(queue_name("a")), callbacks=[lambda *_: None], accept=["json"]):
            dead.drain_events(timeout=20)
        channel.do_restore = False
        (tag,) = client.zrange("unacked_index", 0, -1)
        client.zadd("unacked_index", {tag: 0})  # delivered long ago
        assert not client.keys("render.a*")
        urgent._connection.default_channel.qos.restore_visible()
        assert client.keys("render.a*") == [b"render.a:4"]

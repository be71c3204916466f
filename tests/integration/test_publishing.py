"""The farm publishes the same messages as Celery, and Celery's workers run them."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from celery.contrib.testing.worker import start_worker
from celery.signals import setup_logging

from farm.jobs.records import Doorbell
from farm.queue.broker import RENDER_TASK, Broker, make_app, priority_step, queue_name
from farm.settings import Settings


@pytest.fixture
def settings(valkey: str) -> Settings:
    return Settings.load(database_url="sqlite://", broker_url=valkey, s3_bucket="farm")


@pytest.fixture
def logging_left_alone() -> Iterator[None]:
    """Keep Celery from configuring the logging of the process, which would affect later tests."""

    def leave(**_: object) -> None:
        pass

    setup_logging.connect(leave)
    yield
    setup_logging.disconnect(leave)


BELLS = [
    Doorbell("sea-1", "tiny", 50, "sea 1/2: a \"red\" 'boat' \\ 🎨 (model tiny)"),
    Doorbell("sea-2", "org/name", 100, "sea 2/2: \u2028 (model org/name)"),
]


def lying(settings: Settings) -> dict[str, list[Any]]:
    """Every message by its Redis list, without the random and process-specific fields."""
    with redis.Redis.from_url(settings.broker_url, decode_responses=True) as client:
        found = {}
        for key in client.keys(f"{RENDER_TASK}.*"):
            found[key] = [json.loads(message) for message in client.lrange(key, 0, -1)]
    for messages in found.values():
        for message in messages:
            assert len(message["properties"].pop("delivery_tag")) == 36
            for where, name in (("properties", "reply_to"), ("headers", "origin")):
                assert message[where].pop(name)
    return found


def test_the_messages_are_those_that_celery_publishes(settings: Settings) -> None:
    broker = Broker(settings)
    broker.publish(BELLS)
    ours = lying(settings)
    assert set(ours) == {"render.tiny:4", "render.org/name"}
    broker.close()
    with redis.Redis.from_url(settings.broker_url) as client:
        client.flushall()
    app = make_app(settings)
    for bell in BELLS:
        app.send_task(
            RENDER_TASK,
            args=(bell.job_id,),
            task_id=bell.job_id,
            queue=queue_name(bell.model),
            priority=priority_step(bell.priority),
            argsrepr=f"({bell.job_id!r},)",
            kwargsrepr=bell.shown,
        )
    app.close()
    assert ours == lying(settings)


def test_messages_of_a_queue_are_taken_in_the_order_they_were_published(settings: Settings) -> None:
    broker = Broker(settings)
    broker.publish(Doorbell(f"sea-{n}", "tiny", 50, "sea") for n in range(2500))
    with redis.Redis.from_url(settings.broker_url, decode_responses=True) as client:
        first = [json.loads(client.rpop("render.tiny:4"))["headers"]["id"] for _ in range(2500)]
    assert first == [f"sea-{n}" for n in range(2500)]
    broker.close()


@pytest.mark.usefixtures("logging_left_alone")
def test_a_celery_worker_runs_them(settings: Settings) -> None:
    app = make_app(settings)
    ran: list[tuple[str, str, str]] = []
    done = threading.Event()

    @app.task(name=RENDER_TASK, bind=True)
    def render(self, job_id: str) -> None:
        ran.append((self.request.id, job_id, self.request.kwargsrepr))
        if len(ran) == len(BELLS):
            done.set()

    broker = Broker(settings)
    app.amqp.queues.select([queue_name("tiny"), queue_name("org/name")])
    with start_worker(app, pool="threads", concurrency=1, perform_ping_check=False, shutdown_timeout=30):
        broker.publish(BELLS)
        assert done.wait(30)
    broker.close()
    app.close()
    assert sorted(ran) == [(bell.job_id, bell.job_id, bell.shown) for bell in BELLS]

"""Other task queues on the same Redis: each submits many jobs in its fastest documented way."""

import io
import os
import time
from collections.abc import Callable
from functools import cache
from urllib.parse import urlsplit

import dramatiq
import redis
from celery import Celery, group
from dramatiq.brokers.redis import RedisBroker
from huey import RedisHuey
from PIL import Image
from rq import Queue

from farm.objects.storage import Storage
from farm.queue.broker import make_app
from farm.settings import Settings

# A bare worker of Celery's: `celery -A benchmarks.peers worker`.
app: Celery = make_app(Settings.load()) if os.environ.get("FARM_BROKER_URL") else Celery()


@app.task(name="nothing")
def nothing(job_id: str) -> None:
    """A task that does nothing."""


@app.task(name="put")
def put(job_id: str) -> None:
    """A task that only puts a small PNG into S3."""
    _storage().put(f"bench/{job_id.rpartition(' ')[2]}.png", _png(), "image/png")


@cache
def _storage() -> Storage:
    return Storage(Settings.load())


@cache
def _png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(data, "PNG")
    return data.getvalue()


def prompt(n: int) -> str:
    """The payload of a job."""
    return f"a red circle on a white background, number {n}"


def ways(broker_url: str) -> dict[str, Callable[[int], float]]:
    """Functions by name that submit a number of jobs and return the seconds it took."""
    client = redis.Redis.from_url(broker_url)

    def apply_async(count: int) -> float:
        began = time.perf_counter()
        for n in range(count):
            nothing.apply_async((prompt(n),), queue="bench")
        return time.perf_counter() - began

    def celery_group(count: int) -> float:
        began = time.perf_counter()
        group(nothing.s(prompt(n)).set(queue="bench") for n in range(count)).apply_async()
        return time.perf_counter() - began

    def rq_enqueue_many(count: int) -> float:
        queue = Queue("bench", connection=client)
        began = time.perf_counter()
        queue.enqueue_many([Queue.prepare_data(nothing, args=(prompt(n),)) for n in range(count)])
        return time.perf_counter() - began

    def dramatiq_send(count: int) -> float:
        broker = RedisBroker(url=broker_url)
        actor = dramatiq.actor(nothing.run, broker=broker, actor_name="nothing", queue_name="bench")
        began = time.perf_counter()
        for n in range(count):
            actor.send(prompt(n))
        return time.perf_counter() - began

    def huey_call(count: int) -> float:
        parts = urlsplit(broker_url)
        huey = RedisHuey("bench", host=parts.hostname, port=parts.port, password=parts.password)
        task = huey.task()(nothing.run)
        began = time.perf_counter()
        for n in range(count):
            task(prompt(n))
        return time.perf_counter() - began

    return {
        "Celery, apply_async one by one": apply_async,
        "Celery, a group": celery_group,
        "rq, enqueue_many": rq_enqueue_many,
        "dramatiq, send one by one": dramatiq_send,
        "huey, one by one": huey_call,
    }

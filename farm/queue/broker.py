"""Celery on Redis: the app, a queue per model, and the doorbells in it."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import redis
from celery import Celery
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry

from farm.errors import BrokerUnavailable, NotConfigured
from farm.jobs.records import Doorbell
from farm.queue.envelopes import Envelopes
from farm.settings import Settings
from farm.specs.spec import URGENT

RENDER_TASK = "render"
URGENT_STEP = 0
"""The priority step of urgent messages only; Redis serves it first."""
_PRIORITY_STEPS = tuple(range(10))
_SEPARATOR = ":"
_PUBLISH_CHUNK = 1000


def queue_name(model: str) -> str:
    """The Celery queue of a model's jobs."""
    return f"{RENDER_TASK}.{model}"


def priority_step(priority: int) -> int:
    """The priority step in Redis for a priority of 0 to 100: `URGENT_STEP`, or 1 to 9; lower steps are served first."""
    return URGENT_STEP if priority >= URGENT else 9 - priority * 9 // URGENT


def _line(queue: str, step: int) -> str:
    """The name that kombu gives the Redis list of a queue and a priority step."""
    return f"{queue}{_SEPARATOR}{step}" if step else queue


def make_app(settings: Settings) -> Celery:
    """The Celery app of clients, dispatchers, workers and Flower; connects nothing.

    Messages are acknowledged on receipt: late acknowledgement is unsafe with a thread pool when the broker dies, and
    the lease in SQL replaces it. With `worker_disable_prefetch`, messages stay in Redis until a thread is free, so
    other workers can take them.
    """
    app = Celery("farm", set_as_current=False)
    app.conf.update(
        broker_url=settings.broker_url,
        accept_content=["json"],
        task_serializer="json",
        event_serializer="json",
        result_serializer="json",
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_acks_late=False,
        task_send_sent_event=True,
        task_default_queue=RENDER_TASK,
        task_create_missing_queues=True,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_proc_alive_timeout=60,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": 10,
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
            "priority_steps": list(_PRIORITY_STEPS),
            "sep": _SEPARATOR,
            "socket_timeout": 5,
            "socket_connect_timeout": 3,
            "socket_keepalive": True,
        },
        redis_socket_timeout=5,
        redis_socket_connect_timeout=3,
        event_queue_ttl=60,
        timezone="UTC",
    )
    return app


class Broker:
    """The producer's connection to Redis; raises `BrokerUnavailable` when it does not answer."""

    def __init__(self, settings: Settings) -> None:
        self._app = make_app(settings)
        self.outages = 0
        """How often Redis did not answer."""
        self._envelopes: Envelopes | None = None  # created on the first publish, because it takes a moment
        try:
            self._redis = redis.Redis.from_url(
                settings.broker_url,
                socket_timeout=5,
                socket_connect_timeout=3,
                decode_responses=True,
                encoding_errors="replace",
                # No retries: the caller decides whether and when to retry.
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise NotConfigured("FARM_BROKER_URL is not a Redis URL: redis://:password@host:port/0") from error
        pool = self._redis.connection_pool.connection_kwargs
        self._shown = f"{pool.get('host', 'localhost')}:{pool.get('port', 6379)}"

    def publish(self, doorbells: Iterable[Doorbell]) -> None:
        """Publish doorbells to the queues of their models, in order.

        After an error some of them may be in Redis; publishing a doorbell again is harmless, even if its job was taken.
        """
        if self._envelopes is None:
            self._envelopes = Envelopes(self._app, RENDER_TASK)
        bells = iter(doorbells)
        while chunk := list(islice(bells, _PUBLISH_CHUNK)):
            lines: dict[str, list[str]] = {}
            for bell in chunk:
                queue, step = queue_name(bell.model), priority_step(bell.priority)
                line = lines.setdefault(_line(queue, step), [])
                line.append(self._envelopes.message(bell.job_id, queue, step, bell.shown))
            with self._reached():
                pipe = self._redis.pipeline(transaction=False)
                for key, messages in lines.items():
                    pipe.lpush(key, *messages)
                pipe.execute()

    def waiting(self, model: str) -> set[str]:
        """The ids of a model's jobs with a message in Redis; at most a window of them."""
        with self._reached():
            pipe = self._redis.pipeline(transaction=False)
            for step in _PRIORITY_STEPS:
                pipe.lrange(_line(queue_name(model), step), 0, -1)
            found = {_job_id(message) for line in pipe.execute() for message in line}
            return {job_id for job_id in found if job_id is not None}

    def ping(self) -> None:
        """Raise `BrokerUnavailable` unless Redis answers."""
        with self._reached():
            self._redis.ping()

    def close(self) -> None:
        """Close every connection."""
        self._app.close()
        self._redis.close()

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, OperationalError, ConnectionError, TimeoutError) as error:
            self.outages += 1
            raise BrokerUnavailable(f"Redis at {self._shown} does not answer: {error}") from error


def _job_id(message: str) -> str | None:
    """The job id in a message in Redis; None if the message is not the farm's."""
    try:
        found = json.loads(message)["headers"]["id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return found if isinstance(found, str) else None

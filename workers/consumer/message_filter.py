"""The messages that a worker accepts; every other one is refused before Celery reads it."""

import json
import logging
import re
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from celery.worker.consumer import Consumer
from kombu.transport import redis as kombu_redis
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads
from redis import Redis

from farm.queue.broker import RENDER_TASK

log = logging.getLogger(__name__)

_JOB_ID = re.compile(r"[a-z0-9-]{1,80}-[1-9][0-9]{0,8}")
_MOST_BYTES = 4096


class CheckedConsumer(Consumer):
    """Celery's consumer for doorbells and nothing else.

    Celery does not check a message. One without an id, or with a body of another shape, raises in the worker's loop
    before it is acknowledged: it ends the worker, comes back, and ends the next worker.
    """

    def connection_for_read(self, heartbeat: float | None = None) -> Any:
        """Called whenever Celery connects, for urgent messages too: its connection, with a transport that checks."""
        connection = self.app.connection_for_read(heartbeat=heartbeat)
        # The setting `broker_transport` would not do: for a transport of another name kombu ignores `rediss`.
        connection.transport_cls = f"{__name__}:{CheckedTransport.__name__}"
        return self.ensure_connected(connection)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """Called by Celery's loop and by `UrgentConsumer`: the function that handles each message."""
        handle = super().create_task_handler(*args, **kwargs)

        def checked(message: Any) -> None:
            why = fault(message)
            if why is None:
                handle(message)
            else:
                self.on_decode_error(message, why)

        return checked

    def on_decode_error(self, message: Any, exc: Any) -> None:
        """Log why a message is refused. Celery's own method logs its body, and raises where it has none."""
        log.warning("refused a message: %.200s", exc)
        message.ack_log_error(log, self.connection_errors)  # type: ignore[attr-defined]


class CheckedTransport(kombu_redis.Transport):
    """kombu's Redis transport for lists that may contain anything.

    kombu takes whatever it pops for a message. Anything else raises in the worker's loop, and ends the worker.
    """

    class Channel(kombu_redis.Channel):
        """kombu's channel, whose client checks messages first."""

        class QoS(kombu_redis.QoS):
            """kombu's record of messages that are not acknowledged yet."""

            def restore_unacked(self, client: Any = None) -> None:
                """Called when a channel closes, also where its connection is gone: kombu's own then ends the worker.

                The messages return to Redis after the visibility timeout, or the dispatcher finds them missing.
                """
                if getattr(self.channel.connection, "client", None) is None:
                    self._delivered.clear()  # type: ignore[union-attr]  # None in its stubs, never in fact
                else:
                    super().restore_unacked(client)

        def _get_client(self) -> Any:
            super()._get_client()  # type: ignore[misc]  # it knows which versions of redis-py will do
            return partial(_CheckedRedis, readable=self._readable)

        def _readable(self, item: bytes) -> bool:
            try:
                message = self.Message(loads(bytes_to_str(item)), channel=self)
                where = (message.delivery_tag, message.delivery_info["exchange"], message.delivery_info["routing_key"])
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                return False
            return all(isinstance(name, str) for name in where)


class _CheckedRedis(Redis):
    """redis-py's client, which replaces anything that is no message by an empty one: that is refused like others."""

    def __init__(self, *, readable: Callable[[bytes], bool], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._readable = readable

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        """Called by kombu for the answer to its wait for a message, and by redis-py for all other answers."""
        found: Any = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]
        if command_name == "BRPOP" and found and not self._readable(found[1]):
            return found[0], _nothing()
        return found


def _nothing() -> str:
    where = {"exchange": "", "routing_key": ""}
    return json.dumps({"headers": {}, "properties": {"delivery_tag": str(uuid.uuid4()), "delivery_info": where}})


def fault(message: Any) -> str | None:
    """Why a message is no doorbell; None if it is one."""
    headers = message.headers
    if not isinstance(headers, dict) or headers.get("task") != RENDER_TASK:
        return "it is of another task"
    job_id = headers.get("id")
    if not isinstance(job_id, str) or not _JOB_ID.fullmatch(job_id):
        return "its id is no job's"
    if (message.content_type, message.content_encoding) != ("application/json", "utf-8") or "compression" in headers:
        return "it is not plain JSON"
    body = message.body
    try:
        if len(body) > _MOST_BYTES:
            return f"it has {len(body):,} bytes"
        arguments, keywords, embedded = json.loads(body)
        followed = any(embedded.values())
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "its body is none of Celery's"
    if arguments != [job_id] or keywords or message.properties.get("correlation_id") != job_id:
        return "its arguments are not its job"
    if followed or any(headers.get(name) for name in ("eta", "expires", "group", "chord")):
        return "it wants more than a render"
    return None

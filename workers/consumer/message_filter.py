"""Accepts only valid messages; all others are refused before Celery reads them."""

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
    """Celery's consumer, which accepts doorbells only.

    Celery does not validate messages. A message without an id or with a malformed body raises in the worker's loop
    before it is acknowledged: it ends the worker, is redelivered, and ends the next worker.
    """

    def connection_for_read(self, heartbeat: float | None = None) -> Any:
        """Return a connection with the checking transport; called for every connection, also for urgent messages."""
        connection = self.app.connection_for_read(heartbeat=heartbeat)
        # Not the setting `broker_transport`: kombu ignores `rediss` for a transport of another name.
        connection.transport_cls = f"{__name__}:{CheckedTransport.__name__}"
        return self.ensure_connected(connection)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """Return the function that handles each message; called by Celery's loop and by `UrgentConsumer`."""
        handle = super().create_task_handler(*args, **kwargs)

        def checked(message: Any) -> None:
            why = fault(message)
            if why is None:
                handle(message)
            else:
                self.on_decode_error(message, why)

        return checked

    def on_decode_error(self, message: Any, exc: Any) -> None:
        """Log why a message is refused. Celery's own method logs the body, and raises if there is none."""
        log.warning("refused a message: %.200s", exc)
        message.ack_log_error(log, self.connection_errors)  # type: ignore[attr-defined]


class CheckedTransport(kombu_redis.Transport):
    """kombu's Redis transport for lists that may contain anything.

    kombu assumes that every item it pops is a message. Any other item raises in the worker's loop and ends it.
    """

    class Channel(kombu_redis.Channel):
        """kombu's channel, whose client checks messages first."""

        class QoS(kombu_redis.QoS):
            """kombu's record of unacknowledged messages."""

            def restore_unacked(self, client: Any = None) -> None:
                """Called when a channel closes, even if its connection is lost; kombu's own then ends the worker.

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
    """redis-py's client; it replaces an item that is not a message with an empty message, which is then refused."""

    def __init__(self, *, readable: Callable[[bytes], bool], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._readable = readable

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        """Called by kombu for the reply to its blocking pop, and by redis-py for all other replies."""
        found: Any = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]
        if command_name == "BRPOP" and found and not self._readable(found[1]):
            return found[0], _nothing()
        return found


def _nothing() -> str:
    where = {"exchange": "", "routing_key": ""}
    return json.dumps({"headers": {}, "properties": {"delivery_tag": str(uuid.uuid4()), "delivery_info": where}})


def fault(message: Any) -> str | None:
    """The reason why a message is not a doorbell; None if it is."""
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

"""What a worker accepts as a message; all else is put away before Celery looks into it."""

import json
import logging
import re
from collections.abc import Callable
from typing import Any

from celery.worker.consumer import Consumer

from farm.broker import RENDER_TASK

log = logging.getLogger(__name__)

_JOB_ID = re.compile(r"[a-z0-9-]{1,80}-[1-9][0-9]{0,8}")
_MOST_BYTES = 4096


class CheckedConsumer(Consumer):
    """Celery's consumer for doorbells and nothing else.

    Celery itself takes a message for what it claims to be. One without an id, or with a body of another shape, raises
    in the worker's loop before it is acknowledged: it ends the worker, comes back, and ends the next.
    """

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """Called by Celery's loop, and for urgent messages: what is done with each message."""
        handle = super().create_task_handler(*args, **kwargs)

        def checked(message: Any) -> None:
            why = fault(message)
            if why is None:
                handle(message)
            else:
                self.on_decode_error(message, why)

        return checked

    def on_decode_error(self, message: Any, exc: Any) -> None:
        """Say why a message is put away. Celery's own shows its body, and raises where it has none."""
        log.warning("refused a message: %.200s", exc)
        message.ack_log_error(log, self.connection_errors)  # type: ignore[attr-defined]


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

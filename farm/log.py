"""Logging of the farm's processes: one line per event, to standard error."""

import logging
import sys
from types import TracebackType

FORMAT = "%(asctime)s %(levelname)-7s %(name)s %(message)s"
MOST_CHARS = 4000
"""The maximum length of a line; a message from Redis can contain megabytes."""
_CHATTY = ("alembic", "botocore", "boto3", "urllib3", "kombu", "amqp", "httpx", "PIL", "diffusers", "transformers")


class Plain(logging.Formatter):
    """Escapes line breaks, terminal commands and other control characters.

    Text from a prompt or a message in an event can neither imitate another event nor control the terminal nor fill the
    disk.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's own name)
        """The event on one line."""
        return _escaped(super().formatMessage(record))

    def formatException(  # noqa: N802
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        """The traceback, with its line breaks."""
        return "\n".join(map(_escaped, super().formatException(ei).split("\n")))


def _escaped(text: str) -> str:
    cut = f"… ({len(text):,} characters)" if len(text) > MOST_CHARS else ""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:MOST_CHARS]) + cut


def configure(*, verbose: bool = False) -> None:
    """Configure the logging of a farm process; libraries log at WARNING and above."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Plain(FORMAT))
    logging.basicConfig(handlers=[handler], level=logging.DEBUG if verbose else logging.INFO, force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)

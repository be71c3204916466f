"""How the farm's processes log: one line an event, to standard error."""

import logging
import sys
from types import TracebackType

FORMAT = "%(asctime)s %(levelname)-7s %(name)s %(message)s"
MOST_CHARS = 4000
"""Of a line; what a message from Redis holds can be megabytes."""
_CHATTY = ("alembic", "botocore", "boto3", "urllib3", "kombu", "amqp", "httpx", "PIL", "diffusers", "transformers")


class Plain(logging.Formatter):
    """Writes line breaks, terminal commands and the like as escapes.

    What is quoted in an event, from a prompt or a message, can neither pass for another event nor steer the terminal
    that shows it, nor fill the disk.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's own name)
        """The event in one line."""
        return _escaped(super().formatMessage(record))

    def formatException(  # noqa: N802
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        """The traceback, which keeps its lines."""
        return "\n".join(map(_escaped, super().formatException(ei).split("\n")))


def _escaped(text: str) -> str:
    cut = f"… ({len(text):,} characters)" if len(text) > MOST_CHARS else ""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:MOST_CHARS]) + cut


def configure(*, verbose: bool = False) -> None:
    """Set up logging for a process of its own; libraries are heard from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Plain(FORMAT))
    logging.basicConfig(handlers=[handler], level=logging.DEBUG if verbose else logging.INFO, force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)

"""How the farm's processes log: one line an event, to standard error."""

import logging
import sys

FORMAT = "%(asctime)s %(levelname)-7s %(name)s %(message)s"
_CHATTY = ("alembic", "botocore", "boto3", "urllib3", "kombu", "amqp", "httpx", "PIL", "diffusers", "transformers")


def configure(*, verbose: bool = False) -> None:
    """Set up logging for a process of its own; libraries are heard from WARNING on."""
    logging.basicConfig(stream=sys.stderr, level=logging.DEBUG if verbose else logging.INFO, format=FORMAT, force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)

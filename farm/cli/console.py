"""Shared by the commands: terminal and JSON output, the connection to the farm, and batch and job lookup."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from farm.client.batch import Batch
from farm.client.farm import Farm
from farm.errors import NotFound, ServiceUnavailable
from farm.jobs.records import JobInfo
from farm.runtime.terminal_text import printable
from farm.settings import Settings, uses_embedded_farm

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
BatchName = Annotated[str, typer.Argument(metavar="BATCH", help="A batch, by its name or id.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job, by its id.")]


def complain(text: str) -> None:
    """Print a message on standard error, each line with the program's name."""
    for line in text.splitlines():
        err.print(Text(f"farm: {printable(line)}"), soft_wrap=True)


def print_line(text: str) -> None:
    """Print a text on standard output, safe for a terminal and never wrapped."""
    out.print(Text(printable(text)), soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value on standard output as JSON."""
    print(json.dumps(value, indent=2, default=str))


def plural(noun: str, count: int) -> str:
    """The noun in singular or plural, according to the count."""
    return noun + "s" * (count != 1)


def open_farm() -> Farm:
    """Connect to the configured farm; raises `ServiceUnavailable` if it is an embedded farm that is not running."""
    from farm.local import running

    settings = Settings.load()
    if uses_embedded_farm() and running(settings.home) is None:
        raise ServiceUnavailable(f"the farm in {settings.home.absolute()} does not run: start it with `farm up`")
    return Farm(settings)


def find(farm: Farm, which: str) -> Batch | JobInfo:
    """The batch with this name or id, or the job with this id; raises `NotFound`."""
    try:
        return farm.batch(which)
    except NotFound:
        try:
            return farm.job(which).info
        except NotFound:
            raise NotFound(f"there is no batch or job {which!r}; `farm status` lists the batches") from None

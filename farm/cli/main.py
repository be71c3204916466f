"""The command `farm`, assembled from one module for each group of commands.

Exit codes: 0 success; 1 some jobs did not succeed, or `farm doctor` found something wrong; 2 invalid input or
settings, and nothing was submitted; 3 a service does not answer.
"""

import logging
import sys
from typing import Annotated

import typer

from farm import __version__
from farm.cli import doctor, get, models, operate, status, steer, submit, watch
from farm.cli.console import complain, out, plural
from farm.errors import FarmError, InvalidInput, ServiceUnavailable
from farm.specs.sources import MoreProblems

app = typer.Typer(
    name="farm",
    help="A render farm for text-to-image diffusion: prompts in, pictures out, every job accounted for.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (submit, status, watch, get, steer, models, operate, doctor):
    app.add_typer(group.app)


def main() -> None:
    """Run the command line; every `FarmError` becomes a message and an exit code, without a traceback."""
    try:
        app(standalone_mode=True)
    except InvalidInput as error:
        for problem in error.problems:
            complain(str(problem))
        count = sum(problem.count if isinstance(problem, MoreProblems) else 1 for problem in error.problems)
        complain(f"{count:,} {plural('problem', count)}; nothing was submitted")
        sys.exit(2)
    except ServiceUnavailable as error:
        complain(f"{error}; `farm doctor` looks at every part")
        sys.exit(3)
    except FarmError as error:
        complain(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit
    # Commands print their own messages; the log is for processes that run in the background.
    logging.basicConfig(level=logging.ERROR, format="farm: %(message)s")

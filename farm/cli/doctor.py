"""The command `doctor`: checks every part of the farm, and prints a line for each finding with its remedy."""

from collections.abc import Iterable, Iterator

import typer
from rich.text import Text

from farm.cli.console import Json, out, print_json
from farm.errors import DatabaseUnavailable
from farm.jobs.checks import check_database, check_dispatcher, check_workers
from farm.jobs.database import Database
from farm.local.checks import check_home
from farm.objects.checks import check_storage
from farm.queue.checks import check_broker, check_flower
from farm.runtime.finding import Finding
from farm.settings import Settings, env_file, uses_embedded_farm

app = typer.Typer()


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check every part of the farm, and print a line for each with its state and what to do."""
    findings = list(check(Settings.load(), embedded=uses_embedded_farm()))
    if as_json:
        print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            out.print(line(finding), soft_wrap=True)
    raise typer.Exit(exit_code(findings))


def check(settings: Settings, *, embedded: bool = False) -> Iterator[Finding]:
    """Check every part; a part that does not answer is a finding, and takes some seconds.

    One small object is written to the bucket and deleted; nothing else is changed.
    """
    origin = check_home(settings) if embedded else Finding("settings", "ok", f"from {env_file() or 'the environment'}")
    yield origin
    database = Database(settings.database_url)
    try:
        state = check_database(database)
        yield state
        if origin.level == "bad":
            return  # the embedded farm is not running: no other part can answer
        yield from check_broker(settings)
        yield check_storage(settings)
        yield from check_flower(settings)
        if state.level != "bad":
            log = settings.home / "logs" / "dispatcher.log"
            yield check_dispatcher(database, f"look at {log}" if embedded else "start one: `farm dispatcher`")
            yield from check_workers(database, settings)
    except DatabaseUnavailable as error:
        yield Finding("database", "bad", str(error), "look at the database's log")
    finally:
        database.close()


def line(finding: Finding) -> Text:
    """A finding, formatted for a terminal."""
    mark, style = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "bad": ("✗", "bold red")}[finding.level]
    text = Text.assemble((mark, style), f" {finding.part}: {finding.what}")
    return text.append(f" → {finding.do}") if finding.do else text


def exit_code(findings: Iterable[Finding]) -> int:
    """1 if something is wrong, else 0; a warning is not an error."""
    return int(any(finding.level == "bad" for finding in findings))

"""The command `submit`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from farm.cli.console import Json, err, open_farm, out, plural, print_json, print_line
from farm.cli.get import contact_sheet, fetch
from farm.cli.notices import announce_interrupt, print_errors, warn_of_waiting
from farm.cli.spec_options import with_spec_options
from farm.client.batch import Batch
from farm.jobs.estimates import FIRST, DryRun
from farm.jobs.states import JobState
from farm.runtime.terminal_text import printable
from farm.show.json_forms import batch_json, dry_run_json
from farm.show.tables import batch_table
from farm.specs.sources import SUFFIXES, is_axis, is_file, rows
from farm.specs.spec import RenderSpec

app = typer.Typer()


@app.command()
@with_spec_options
def submit(
    what: Annotated[
        list[str], typer.Argument(metavar="PROMPT|FILE...", help="Prompts, or .txt, .csv and .jsonl files of prompts.")
    ],
    name: Annotated[str | None, typer.Option(help="The batch's name.")] = None,
    priority: Annotated[int, typer.Option(help="From 0 to 100; higher is served first, 90 and above is urgent.")] = 50,
    key: Annotated[
        str | None,
        typer.Option(help="An idempotency key: the same submission with the same key is the same batch."),
    ] = None,
    reuse: Annotated[
        bool, typer.Option("--reuse/--no-reuse", help="Copy the picture of an identical earlier job, if there is one.")
    ] = True,
    seeds: Annotated[
        str | None, typer.Option(help="Render each prompt with each of these seeds, such as 0..9 or 1,5,7.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE,…",
            help="Render each prompt with each combination of these values, such as steps=20,30 guidance=5,7.5. A name "
            "is that of an option under 'What to render', or size, as in size=512x512,768x512. The values of the grid "
            "take precedence over those of a row.",
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help='Build the prompts from the columns of CSV or JSONL files: "a {animal} in {style}".'),
    ] = None,
    wildcards: Annotated[
        bool,
        typer.Option(
            "--wildcards",
            help="Replace {red|blue} in prompts by one of the choices, and __animal__ by a line of "
            "wildcards/animal.txt. Without this option, braces in prompts stay as they are.",
        ),
    ] = False,
    choices: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder of the wildcard files, if it is not wildcards/.")
    ] = None,
    wildcard_seed: Annotated[
        int | None,
        typer.Option(help="The seed of the wildcards; by default each spec's own seed, or 0 if it has none."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Submit nothing; print the number of pictures, the first specs and the estimated time."
        ),
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until every job has ended.")] = False,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Wait, and save the pictures and a contact sheet in this folder.")
    ] = None,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Submit prompts: as arguments, or from .txt files (a prompt per line), .csv or .jsonl files.

    Files are UTF-8. Precedence: options < the values of a row < --grid and --seeds. Every problem is reported with its
    file and line, and then nothing is submitted.
    """
    if grid is not None:
        # The shell splits `--grid steps=20,30 guidance=5,7.5` into an option and an argument.
        grid += [text for text in what if is_axis(text) and not is_file(text)]
        what = [text for text in what if text not in grid]
        fields["grid"] = grid
    fields |= {
        "name": name or _name_from(what),
        "priority": priority,
        "key": key,
        "reuse": reuse,
        "seeds": seeds,
        "template": template,
        "wildcards": choices or wildcards,
        "wildcard_seed": wildcard_seed,
    }
    read = rows(what, variables=template is not None)
    with open_farm() as farm:
        if dry_run:
            _print_dry_run(farm.dry_run(read, **fields), as_json=as_json)
            return
        farm.check()  # before the batch is in SQL: after an error, nothing may be submitted
        with err.status("submitting …"):
            batch = farm.submit(read, **fields)
        if not as_json:
            print_line(f"{batch.total} jobs submitted as {batch.id}")
            warn_of_waiting(farm, batch.id)
        if wait or folder is not None:
            _wait(batch, folder, as_json=as_json)
        elif as_json:
            print_json(batch_json(batch.status()))


def _name_from(what: Sequence[str]) -> str:
    first = what[0] if what else ""
    return Path(first).stem if first.endswith(SUFFIXES) else " ".join(first.split()[:5])[:60]


def _print_dry_run(result: DryRun, *, as_json: bool) -> None:
    if as_json:
        print_json(dry_run_json(result))
        return
    out.print(f"{result.count:,} {plural('picture', result.count)}; nothing was submitted")
    out.print(_spec_table(result.first))
    for model in result.unmeasured[:FIRST]:
        print_line(f"device seconds of {model} unknown: nothing rendered yet with this model")
    if result.device_seconds is not None:
        others = " for the other models" * bool(result.unmeasured)
        out.print(f"about {result.device_seconds:,.0f} device seconds{others}, by what was rendered lately")


def _spec_table(specs: Sequence[RenderSpec]) -> Table:
    """A row for each spec with the fields that were set; fields that differ between specs come first."""
    dumped = [spec.model_dump(exclude_unset=True) for spec in specs]
    names = [name for name in RenderSpec.model_fields if any(name in fields for fields in dumped)]
    names.sort(key=lambda name: all(fields.get(name) == dumped[0].get(name) for fields in dumped))
    table = Table(*names, box=None, header_style="bold")
    for fields in dumped:
        values = (printable(str(fields.get(name, ""))) for name in names)
        table.add_row(*(Text(value if len(value) < 60 else value[:59] + "…") for value in values))
    return table


def _wait(batch: Batch, folder: Path | None, *, as_json: bool) -> None:
    """Wait for a batch, fetch its pictures and print its outcome; exits with 1 unless every job succeeded."""
    with announce_interrupt(batch):
        ended = batch.wait(progress=not as_json)
    count, files = 0, list[str]()
    if folder is not None:
        count, files = fetch(batch, folder, as_json=as_json)
        files.append(str(contact_sheet(batch, folder)))
    if as_json:
        print_json({**batch_json(ended), "files": files})
    else:
        out.print(batch_table([ended]))
        print_errors(batch)
        if folder is not None:
            print_line(f"{count} pictures and contact_sheet.png in {folder}")
    if ended.counts[JobState.SUCCEEDED] < ended.total:
        raise typer.Exit(1)

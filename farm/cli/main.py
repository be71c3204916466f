"""The command `farm`.

Exit codes: 0 all is well; 1 something was not rendered, or the doctor found something wrong; 2 bad input or settings,
with nothing submitted; 3 a service does not answer.
"""

import logging
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from farm import __version__
from farm.cli import get, models, operate, steer, watch
from farm.cli.console import Json, batch_json, complain, err, find, job_json, open_farm, out, say_json
from farm.cli.get import fetched, sheet
from farm.cli.spec_options import with_spec_options
from farm.cli.watch import interrupted, say_wrong
from farm.client.batch import Batch
from farm.client.farm import Farm
from farm.client.previews import Preview
from farm.errors import FarmError, InvalidInput, JobNotSucceeded, ServiceUnavailable
from farm.jobs.estimates import FIRST, DryRun
from farm.jobs.records import JobInfo
from farm.jobs.states import JobState
from farm.runtime.atomic_files import atomic_file
from farm.runtime.terminal_text import printable
from farm.show.tables import batch_table, job_table
from farm.specs.sources import MoreProblems, is_axis, is_file, rows
from farm.specs.spec import RenderSpec

app = typer.Typer(
    name="farm",
    help="A render farm for text-to-image diffusion: prompts in, pictures out, every job accounted for.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(steer.app)
app.add_typer(get.app)
app.add_typer(operate.app)
app.add_typer(watch.app)
app.add_typer(models.app)

_FIRST_JOBS = 1000


def main() -> None:
    """Run the command line; every error of the farm's own is a line, never a traceback."""
    try:
        app(standalone_mode=True)
    except InvalidInput as error:
        for problem in error.problems:
            complain(str(problem))
        count = sum(problem.count if isinstance(problem, MoreProblems) else 1 for problem in error.problems)
        complain(f"{count:,} problem{'s' * (count > 1)}; nothing was submitted")
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
def _top(version: Annotated[bool, typer.Option("--version", help="Say the version.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit
    # A command that a person waits for speaks through its own lines, not through the log.
    logging.basicConfig(level=logging.ERROR, format="farm: %(message)s")


@app.command()
@with_spec_options
def submit(
    what: Annotated[list[str], typer.Argument(metavar="PROMPT|FILE...", help="Prompts, or .txt, .csv, .jsonl files.")],
    name: Annotated[str | None, typer.Option(help="The batch's name.")] = None,
    priority: Annotated[int, typer.Option(help="0 to 100, the higher the sooner.")] = 50,
    key: Annotated[
        str | None, typer.Option(help="Your name for this submission: handed in again, it is the same batch.")
    ] = None,
    reuse: Annotated[
        bool, typer.Option("--reuse/--no-reuse", help="Copy pictures that were rendered before, of the same spec.")
    ] = True,
    seeds: Annotated[str | None, typer.Option(help="Each prompt with each of these, such as 0..9 or 1,5,7.")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE,…",
            help="Each prompt with each combination, such as steps=20,30 guidance=5,7.5; also size=512x512,768x512, "
            "sampler, and any field by its name. Outweighs what a row says.",
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help='Make prompts of the columns of CSV or JSONL: "a {animal} in {style}".')
    ] = None,
    wildcards: Annotated[
        bool,
        typer.Option(
            "--wildcards",
            help="Draw one of {red|blue} in prompts, and a line of wildcards/animal.txt for __animal__. Without this, "
            "braces in prompts stay as they are.",
        ),
    ] = False,
    choices: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the files of --wildcards are, if not in wildcards/.")
    ] = None,
    wildcard_seed: Annotated[
        int | None, typer.Option(help="Draw from this instead of from each spec's seed (or 0, where it has none).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Submit nothing; say how many pictures, which first, and how long.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until every job has ended.")] = False,
    folder: Annotated[Path | None, typer.Option("--out", help="Wait, and put the pictures here.")] = None,
    as_json: Json = False,
    **fields: Any,
) -> None:
    """Hand in prompts: as arguments, or from text (a prompt a line), CSV or JSONL files.

    Files are UTF-8. Each line or cell overrules the options for all. Everything that is wrong is said, with file and
    line, and then nothing is submitted.
    """
    options = dict(fields)
    if grid is not None:
        # The shell has split `--grid steps=20,30 guidance=5,7.5` into an option and an argument.
        grid += [text for text in what if is_axis(text) and not is_file(text)]
        what = [text for text in what if text not in grid]
        options["grid"] = grid
    options |= {
        "name": name or _name_from(what),
        "priority": priority,
        "key": key,
        "reuse": reuse,
        "seeds": seeds,
        "template": template,
        "wildcards": choices or wildcards,
        "wildcard_seed": wildcard_seed,
    }
    found = rows(what, variables=template is not None)
    with open_farm() as farm:
        if dry_run:
            _say_dry_run(farm.dry_run(found, **options), as_json=as_json)
            return
        farm.check()  # rather than leave a batch in SQL that a person believes was refused
        with err.status("submitting …"):
            batch = farm.submit(found, **options)
        if not as_json:
            out.print(Text(f"{batch.total} jobs submitted as {printable(batch.id)}"), soft_wrap=True)
            _warn_unheld(farm, batch.id)
        if wait or folder is not None:
            _see_through(batch, folder, as_json=as_json)
        elif as_json:
            say_json(batch_json(batch.status()))


@app.command()
def status(
    which: Annotated[str | None, typer.Argument(metavar="[BATCH|JOB]", help="Its name or id.")] = None,
    as_json: Json = False,
) -> None:
    """Show the newest batches, or one batch or job; as JSON with a batch's first jobs (`farm jobs` lists all)."""
    with open_farm() as farm:
        if which is None:
            batches = farm.batches()
            if as_json:
                say_json([batch_json(batch) for batch in batches])
            else:
                out.print(batch_table(batches) if batches else "no batches yet: `farm submit` hands one in")
                _warn_unheld(farm)
            return
        found = find(farm, which)
        if isinstance(found, JobInfo):
            say_json(job_json(found)) if as_json else out.print(job_table([found], whole=True))
        elif as_json:
            first = [job_json(job.info) for job in islice(found, _FIRST_JOBS)]
            say_json({**batch_json(found.status()), "jobs": first, "further": found.total > len(first)})
        else:
            out.print(batch_table([found.status()]))
            _warn_unheld(farm, found.id)
            say_wrong(found)


@app.command()
def preview(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="Its id.")],
    vae: Annotated[bool, typer.Option("--vae", help="Decoded by the VAE: sharp, and costs the worker time.")] = False,
    path: Annotated[Path | None, typer.Option("--out", help="The PNG to write; by default JOB.preview.png.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Write each new one over it until the job ends.")] = False,
) -> None:
    """Show how a job looks that is being rendered: a PNG of what is there after some of its steps."""
    path = path or Path(f"{job_id}.preview.png")
    with open_farm() as farm:
        job = farm.job(job_id)
        if follow:
            for shown in job.previews(vae=vae):
                _show(shown, path)
        try:
            _show(job.preview(vae=vae), path)
        except (TimeoutError, JobNotSucceeded) as error:
            complain(str(error))
            raise typer.Exit(1) from None


def _show(shown: Preview, path: Path) -> None:
    # An image viewer may read the file meanwhile.
    with atomic_file(path) as file:
        shown.image.save(file, "PNG")
    out.print(Text(f"step {shown.step} of {shown.steps} in {path}"), soft_wrap=True)


def _say_dry_run(found: DryRun, *, as_json: bool) -> None:
    if as_json:
        say_json({**vars(found), "first": [spec.model_dump(mode="json", exclude_unset=True) for spec in found.first]})
        return
    out.print(f"{found.count:,} picture{'s' * (found.count > 1)}; nothing was submitted")
    out.print(_spec_table(found.first))
    for model in found.unmeasured[:FIRST]:
        out.print(Text(f"device seconds of {model} unknown: nothing rendered yet with this model"), soft_wrap=True)
    if found.device_seconds is not None:
        others = " for the other models" * bool(found.unmeasured)
        out.print(f"about {found.device_seconds:,.0f} device seconds{others}, by what was rendered lately")


def _spec_table(specs: Sequence[RenderSpec]) -> Table:
    """A line a spec, of what somebody asked for: first the fields in which they differ."""
    asked = [spec.model_dump(exclude_unset=True) for spec in specs]
    names = [name for name in RenderSpec.model_fields if any(name in fields for fields in asked)]
    names.sort(key=lambda name: all(fields.get(name) == asked[0].get(name) for fields in asked))
    table = Table(*names, box=None, header_style="bold")
    for fields in asked:
        values = (printable(str(fields.get(name, ""))) for name in names)
        table.add_row(*(Text(value if len(value) < 60 else value[:59] + "…") for value in values))
    return table


def _name_from(what: list[str]) -> str:
    first = what[0] if what else ""
    return Path(first).stem if first.endswith((".txt", ".csv", ".jsonl")) else " ".join(first.split()[:5])[:60]


def _warn_unheld(farm: Farm, batch_id: str | None = None) -> None:
    """Say so when jobs are for a model that no worker holds, or too large for all: they would wait without a word."""
    if missing := farm.unheld(batch_id):
        complain(f"no worker holds {', '.join(missing)} now; its jobs wait until one does (farm worker --models …)")
    for model, most in farm.too_large(batch_id).items():
        room = f"{most:,} pixels ({most // 2:,} with guidance)"
        complain(f"no worker has the memory for {model} beyond {room} now; what is larger waits until one has")


def _see_through(batch: Batch, folder: Path | None, *, as_json: bool) -> None:
    """Wait for a batch behind a bar, fetch its pictures, say how it ended; exits with 1 unless all succeeded."""
    with interrupted(batch):
        ended = batch.wait(progress=not as_json)
    count, files = 0, list[str]()
    if folder is not None:
        count, files = fetched(batch, folder, as_json=as_json)
        files.append(str(sheet(batch, folder)))
    if as_json:
        say_json({**batch_json(ended), "files": files})
    else:
        out.print(batch_table([ended]))
        say_wrong(batch)
        if folder is not None:
            out.print(Text(f"{count} pictures and contact_sheet.png in {folder}"), soft_wrap=True)
    if ended.counts[JobState.SUCCEEDED] < ended.total:
        raise typer.Exit(1)

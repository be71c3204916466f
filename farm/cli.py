"""The command `farm`.

Exit codes: 0 all is well; 1 something was not rendered, or the doctor found something wrong; 2 bad input or settings,
with nothing submitted; 3 a service does not answer.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from farm import __version__
from farm.client import Batch, Farm
from farm.errors import FarmError, InvalidInput, NotConfigured, NotFound, ServiceUnavailable
from farm.log import configure
from farm.records import BatchStatus, JobInfo
from farm.settings import Settings
from farm.sources import rows
from farm.states import JobState
from farm.tables import batch_table, job_table, printable, worker_table

app = typer.Typer(
    name="farm",
    help="A render farm for text-to-image diffusion: prompts in, pictures out, every job accounted for.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_WATCH_SECONDS = 0.5

Json = Annotated[bool, typer.Option("--json", help="Say it as JSON.")]


def main() -> None:
    """Run the command line; every error of the farm's own is a line, never a traceback."""
    try:
        app(standalone_mode=True)
    except InvalidInput as error:
        for problem in error.problems:
            _complain(str(problem))
        _complain(f"{len(error.problems)} problem{'s' * (len(error.problems) > 1)}; nothing was submitted")
        sys.exit(2)
    except ServiceUnavailable as error:
        _complain(f"{error}; `farm doctor` looks at every part")
        sys.exit(3)
    except FarmError as error:
        _complain(str(error))
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
def up(workers: Annotated[int, typer.Option(min=0, help="How many workers share this machine.")] = 1) -> None:
    """Start the embedded farm here and keep it running: Redis, S3, SQLite, dispatcher, workers, Flower."""
    from farm.local import LocalFarm

    LocalFarm(_home(), workers=workers, console=out).run()


@app.command()
def submit(
    what: Annotated[list[str], typer.Argument(metavar="PROMPT|FILE...", help="Prompts, or .txt, .csv, .jsonl files.")],
    name: Annotated[str | None, typer.Option(help="The batch's name.")] = None,
    priority: Annotated[int, typer.Option(help="0 to 100, the higher the sooner.")] = 50,
    model: Annotated[str | None, typer.Option(help="A model that a worker pins.")] = None,
    negative_prompt: Annotated[str | None, typer.Option("--negative-prompt", "--negative")] = None,
    num_inference_steps: Annotated[int | None, typer.Option("--num-inference-steps", "--steps")] = None,
    guidance_scale: Annotated[float | None, typer.Option("--guidance-scale", "--guidance")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8.")] = None,
    seed: Annotated[int | None, typer.Option(help="0 to 4294967295; drawn for each job if left out.")] = None,
    scheduler: Annotated[str | None, typer.Option("--scheduler", "--sampler", help="Such as euler_a.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until every job has ended.")] = False,
    folder: Annotated[Path | None, typer.Option("--out", help="Wait, and put the pictures here.")] = None,
    as_json: Json = False,
) -> None:
    """Hand in prompts: as arguments, or from text (a prompt a line), CSV or JSONL files."""
    fields = {
        "model": model,
        "negative_prompt": negative_prompt,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "width": width,
        "height": height,
        "seed": seed,
        "scheduler": scheduler,
    }
    defaults: dict[str, Any] = {key: value for key, value in fields.items() if value is not None}
    with _farm() as farm:
        farm.check()  # rather than leave a batch in SQL that a person believes was refused
        with err.status("submitting …"):
            batch = farm.submit(rows(what), name=name or _name_from(what), priority=priority, **defaults)
        if not as_json:
            out.print(Text(f"{batch.total} jobs submitted as {printable(batch.id)}"), soft_wrap=True)
            _warn_unheld(farm, batch)
        if wait or folder is not None:
            _see_through(batch, folder, as_json=as_json)
        elif as_json:
            _say_json(_batch_json(batch.status()))


@app.command()
def status(
    which: Annotated[str | None, typer.Argument(metavar="[BATCH|JOB]", help="Its name or id.")] = None,
    as_json: Json = False,
) -> None:
    """Show the newest batches, or one batch or job."""
    with _farm() as farm:
        if which is None:
            batches = farm.batches()
            if as_json:
                _say_json([_batch_json(batch) for batch in batches])
            else:
                out.print(batch_table(batches) if batches else "no batches yet: `farm submit` hands one in")
            return
        found = _find(farm, which)
        if isinstance(found, JobInfo):
            _say_json(_job_json(found)) if as_json else out.print(job_table([found], whole=True))
        elif as_json:
            _say_json({**_batch_json(found.status()), "jobs": [_job_json(job.info) for job in found]})
        else:
            out.print(batch_table([found.status()]))
            wrong = [job.info for job in found if job.error]
            if wrong:
                out.print(job_table(wrong[:20]))


@app.command()
def watch(
    which: Annotated[str | None, typer.Argument(metavar="[BATCH]", help="One batch, to its end.")] = None,
) -> None:
    """Watch batches and workers, live, until Ctrl-C; or one batch until it ends."""
    with _farm() as farm:
        if which is not None:
            _see_through(farm.batch(which), None, as_json=False)
            return
        with Live(console=out, auto_refresh=False, transient=False) as live:
            while True:
                live.update(Group(batch_table(farm.batches(12)), worker_table(farm.workers())), refresh=True)
                time.sleep(_WATCH_SECONDS)


@app.command()
def get(
    which: Annotated[str, typer.Argument(metavar="BATCH|JOB", help="Its name or id.")],
    folder: Annotated[Path, typer.Option("--out", help="Where to put the pictures.")] = Path("out"),
    sheet: Annotated[bool, typer.Option("--sheet", help="A contact sheet beside them.")] = False,
    as_json: Json = False,
) -> None:
    """Fetch the pictures of a batch or a job."""
    with _farm() as farm:
        found = _find(farm, which)
        if isinstance(found, JobInfo):
            folder.mkdir(parents=True, exist_ok=True)
            paths = [farm.job(found.id).download(folder)]
        else:
            paths = found.download(folder, progress=not as_json)
            if sheet:
                paths.append(_sheet(found, folder))
        if as_json:
            _say_json({"files": [str(path) for path in paths]})
        else:
            out.print(Text(f"{len(paths)} files in {folder}"), soft_wrap=True)


@app.command()
def cancel(which: Annotated[str, typer.Argument(metavar="BATCH|JOB", help="Its name or id.")]) -> None:
    """Cancel what has not ended of a batch or a job."""
    with _farm() as farm:
        found = _find(farm, which)
        count = int(farm.job(found.id).cancel()) if isinstance(found, JobInfo) else found.cancel()
        out.print(f"{count} job{'s' * (count != 1)} cancelled" if count else "nothing to cancel: all have ended")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def worker(context: typer.Context) -> None:
    """Render on this machine: one worker, its models pinned (--help shows its options)."""
    if find_spec("torch") is None or find_spec("diffusers") is None:
        raise NotConfigured("a worker needs torch and diffusers: pip install 'diffusion-farm[worker]'")
    # The farm's own packages never import what renders; and the worker gets a process without the command line's.
    os.execv(sys.executable, [sys.executable, "-m", "workers", *context.args])  # noqa: S606


@app.command()
def dispatcher() -> None:
    """Keep Redis supplied from the backlog, and bring back what was lost. Any number may run."""
    from farm.broker import Broker
    from farm.db import Database
    from farm.dispatch import Dispatcher
    from farm.jobs import JobStore

    configure()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    settings = Settings.load()
    db = Database(settings.database_url)
    db.check_schema()
    broker = Broker(settings)
    try:
        Dispatcher(JobStore(db, settings), broker, settings).run(stop)
    finally:
        broker.close()
        db.close()


@app.command()
def models(as_json: Json = False) -> None:
    """Show which models the workers hold, and what waits for each."""
    with _farm() as farm:
        held: dict[str, dict[str, Any]] = {}
        for one in farm.workers():
            for model in one.models if one.alive else ():
                entry = held.setdefault(model["name"], {"sha256": model["sha256"], "workers": [], "waiting": 0})
                entry["workers"].append(one.name)
        for model_name, waiting in farm.waiting().items():
            held.setdefault(model_name, {"sha256": None, "workers": []})["waiting"] = waiting
    if as_json:
        _say_json(held)
        return
    table = Table("model", "weights", "workers", "waiting", box=None, header_style="bold")
    for model_name, entry in sorted(held.items()):
        holders = Text(", ".join(entry["workers"])) if entry["workers"] else Text("none holds it", style="red")
        table.add_row(Text(model_name), (entry["sha256"] or "")[:12], holders, str(entry["waiting"]))
    out.print(table if held else "no worker is there, and nothing waits")


@app.command()
def migrate() -> None:
    """Bring the database's schema up to this version's; harmless when it is."""
    from farm.db import Database

    Database(Settings.load().database_url).migrate()
    out.print("the schema is this version's")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check every part, and say in a line each what is wrong and what to do."""
    from farm import doctor as checks

    findings = checks.check(Settings.load())
    if as_json:
        _say_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            out.print(checks.line(finding), soft_wrap=True)
    raise typer.Exit(checks.exit_code(findings))


# --- what the commands share ------------------------------------------------------------------------------------


def _complain(text: str) -> None:
    for line in text.splitlines():
        err.print(Text(f"farm: {printable(line)}"), soft_wrap=True)


def _say_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def _home() -> Path:
    return Path(os.environ.get("FARM_HOME", ".farm"))


def _farm() -> Farm:
    """The farm that commands talk to; raises `ServiceUnavailable` for an embedded one that does not run."""
    from farm.local import running
    from farm.local.home import SERVICE_VARIABLES

    settings = Settings.load()
    if not SERVICE_VARIABLES & os.environ.keys() and running(settings.home) is None:
        raise ServiceUnavailable(f"the farm in {settings.home.absolute()} does not run: start it with `farm up`")
    return Farm(settings)


def _name_from(what: list[str]) -> str:
    first = what[0]
    return Path(first).stem if first.endswith((".txt", ".csv", ".jsonl")) else " ".join(first.split()[:5])[:60]


def _find(farm: Farm, which: str) -> Batch | JobInfo:
    try:
        return farm.batch(which)
    except NotFound:
        try:
            return farm.job(which).info
        except NotFound:
            raise NotFound(f"there is no batch or job {which!r}; `farm status` lists the batches") from None


def _warn_unheld(farm: Farm, batch: Batch) -> None:
    """Say so when jobs are for a model that no worker holds: they would wait without a word."""
    held = {model["name"] for one in farm.workers() if one.alive for model in one.models}
    missing = sorted(model for model in farm.waiting() if model not in held)
    if missing and any(job.spec.model in missing for job in batch):
        _complain(f"no worker holds {', '.join(missing)} now; its jobs wait until one does (farm worker --models …)")


def _sheet(batch: Batch, folder: Path) -> Path:
    path = folder / "contact_sheet.png"
    batch.contact_sheet().save(path)
    return path


def _see_through(batch: Batch, folder: Path | None, *, as_json: bool) -> None:
    """Wait for a batch behind a bar, fetch its pictures, say how it ended; exits with 1 unless all succeeded."""
    with _interrupted(batch):
        ended = batch.wait(progress=not as_json)
    files: list[Path] = []
    if folder is not None:
        files = batch.download(folder, progress=not as_json)
        files.append(_sheet(batch, folder))
    if as_json:
        _say_json({**_batch_json(ended), "files": [str(path) for path in files]})
    else:
        out.print(batch_table([ended]))
        wrong = [job.info for job in batch if job.state is JobState.FAILED]
        if wrong:
            out.print(job_table(wrong[:20]))
        if folder is not None:
            out.print(Text(f"{len(files) - 1} pictures and contact_sheet.png in {folder}"), soft_wrap=True)
    if ended.counts[JobState.SUCCEEDED] < ended.total:
        raise typer.Exit(1)


@contextmanager
def _interrupted(batch: Batch) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _complain(f"{batch.id} goes on; `farm watch {batch.id}` waits again, `farm cancel {batch.id}` ends it")
        raise


def _batch_json(batch: BatchStatus) -> dict[str, Any]:
    return {
        "batch": batch.id,
        "name": batch.name,
        "owner": batch.owner,
        "priority": batch.priority,
        "total": batch.total,
        "done": batch.done,
        "counts": {state.value: count for state, count in batch.counts.items()},
        "created_at": batch.created_at,
        "finished_at": batch.finished_at,
    }


def _job_json(job: JobInfo) -> dict[str, Any]:
    return {
        "job": job.id,
        "index": job.index,
        "state": job.state.value,
        "attempt": job.attempt,
        "tries": job.tries,
        "worker": job.worker,
        "steps_done": job.steps_done,
        "error": job.error,
        "spec": job.spec.model_dump(mode="json"),
        "picture": vars(job.picture) if job.picture else None,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
    }

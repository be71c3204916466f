"""The commands that operate a farm: its processes, its settings for other machines and its schema."""

import os
import sys
import threading
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from farm.cli.console import complain, out
from farm.errors import NotConfigured
from farm.log import configure
from farm.settings import Settings, embedded_home

app = typer.Typer()


@app.command()
def up(workers: Annotated[int, typer.Option(min=0, help="The number of workers on this machine.")] = 1) -> None:
    """Start the embedded farm and keep it running: Redis, S3, SQLite, dispatcher, workers and Flower."""
    from farm.local import LocalFarm

    LocalFarm(embedded_home(), workers=workers, console=out).run()


@app.command()
def env(
    to: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write them to this file, readable only by you.")
    ] = None,
    export: Annotated[
        bool, typer.Option("--export", help='Print them as shell commands: eval "$(farm env --export)".')
    ] = False,
) -> None:
    """Print the settings with which other machines join this farm, passwords included, for FARM_ENV_FILE."""
    from farm.cli.environment import as_file, as_shell, reach, variables
    from farm.runtime.atomic_files import write_atomic

    settings = Settings.load()
    values = variables(settings)
    text = as_shell(values) if export else as_file(values)
    if to is None:
        print(text, end="")
    else:
        try:
            write_atomic(to, text, private=True, durable=True)
        except OSError as error:
            raise NotConfigured(f"can't write {to}: {error.strerror}") from error
    complain("this holds the farm's passwords: who has it can read, change and delete everything in the farm")
    for line in reach(settings):
        complain(line)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def worker(context: typer.Context) -> None:
    """Render on this machine with one worker, or with `--gpus all` one for each GPU; --help shows the options."""
    if find_spec("torch") is None or find_spec("diffusers") is None:
        raise NotConfigured("a worker needs torch and diffusers: pip install 'diffusion-farm[worker]'")
    # The farm never imports torch; the worker replaces this process.
    os.execv(sys.executable, [sys.executable, "-m", "workers", *context.args])  # noqa: S606


@app.command()
def dispatcher() -> None:
    """Move jobs from the backlog to Redis, and requeue lost ones. Several may run; one leads."""
    from farm.dispatch.dispatcher import Dispatcher
    from farm.dispatch.metrics import serve
    from farm.jobs.database import Database
    from farm.jobs.leadership import DISPATCHER, Leadership
    from farm.jobs.store import JobStore
    from farm.objects.storage import Storage
    from farm.queue.broker import Broker
    from farm.runtime.stopping import stop_signals

    configure()
    stop = threading.Event()
    with stop_signals(stop), ExitStack() as opened:
        settings = Settings.load()
        db = opened.enter_context(closing(Database(settings.database_url)))
        db.check_schema()
        storage = opened.enter_context(closing(Storage(settings)))
        broker = opened.enter_context(closing(Broker(settings)))
        store, leadership = JobStore.over(db, settings), Leadership(db, DISPATCHER)
        dispatcher = Dispatcher(store, broker, storage, settings)
        metrics = serve(
            db, store.workers, dispatcher, leadership, settings, {"sql": db, "redis": broker, "s3": storage}
        )
        if metrics is not None:
            opened.callback(metrics.close)
        dispatcher.run(stop, leadership)


@app.command()
def migrate(
    bucket: Annotated[bool, typer.Option("--bucket", help="Create the bucket, too, if it does not exist.")] = False,
) -> None:
    """Upgrade the schema of the database to this version; may be run again."""
    from farm.jobs.database import Database
    from farm.objects.storage import Storage

    settings = Settings.load()
    with closing(Database(settings.database_url)) as database:
        database.migrate()
    out.print("the schema is this version's")
    if bucket:
        with closing(Storage(settings)) as storage:
            storage.ensure_bucket()
        out.print(f"bucket {settings.s3_bucket} is there")

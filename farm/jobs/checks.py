"""Checks of the database, and of the dispatcher and the workers as the database knows them."""

import time
from collections.abc import Callable, Iterator

from farm.errors import FarmError, SchemaMismatch
from farm.jobs.conditions import JOB_PAUSED, waiting_by_model
from farm.jobs.database import Database
from farm.jobs.leadership import DISPATCHER, RENEW_SECONDS, leader
from farm.jobs.workers import Workers
from farm.runtime.finding import Finding
from farm.settings import Settings
from farm.version import __version__

TAKEOVER_SECONDS = 2 * RENEW_SECONDS
"""After a dispatcher has resigned, another one takes over within this time."""
_POLL_SECONDS = 0.1


def check_database(database: Database) -> Finding:
    """Whether the database answers, and has a schema that this version works with."""
    shown = database.shown
    try:
        database.check_schema()
    except SchemaMismatch as error:
        return Finding("database", "bad", f"{shown}: {error}", "run `farm migrate` with the newest version in use")
    except FarmError as error:
        return Finding("database", "bad", str(error), "start it, or correct FARM_DATABASE_URL")
    return Finding("database", "ok", f"{shown} answers, and its schema is this version's")


def check_dispatcher(
    database: Database,
    remedy: str,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Finding:
    """Whether a dispatcher leads; raises `DatabaseUnavailable`."""
    deadline = clock() + TAKEOVER_SECONDS
    while (found := leader(database, DISPATCHER)) is None:
        if clock() >= deadline:
            return Finding("dispatcher", "bad", "does not run", remedy)
        sleep(_POLL_SECONDS)
    return Finding("dispatcher", "ok", f"runs on {found.host} as process {found.pid}")


def check_workers(database: Database, settings: Settings) -> Iterator[Finding]:
    """Whether every worker is alive, of this version, and whether every model that jobs need is served.

    Raises `DatabaseUnavailable`.
    """
    workers = Workers(database, settings).all()
    for worker in workers:
        models = ", ".join(model.name for model in worker.models)
        if not worker.alive:
            yield Finding("worker", "warn", f"{worker.name} sends no heartbeats", "check whether it runs; restart it")
        elif worker.version != __version__:
            yield Finding(
                "worker", "warn", f"{worker.name} runs version {worker.version}, this is {__version__}", "upgrade one"
            )
        else:
            yield Finding("worker", "ok", f"{worker.name} on {worker.device}, {worker.slots} slots, serves {models}")
    if not any(worker.alive for worker in workers):
        yield Finding("worker", "bad", "none is alive", "start one: `farm worker`")
    served = {model.name for worker in workers if worker.alive for model in worker.models}
    with database.read() as session:
        waiting = waiting_by_model(session, ~JOB_PAUSED)  # paused jobs wait for a person
    for model, count in sorted(waiting.items()):
        if model not in served:
            yield Finding(
                "models",
                "bad",
                f"{count} job{'s' * (count > 1)} wait{'s' * (count == 1)} for {model!r}, which no live worker serves",
                f"start a worker with FARM_MODELS={model}=…, or cancel them",
            )

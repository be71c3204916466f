"""What the commands of `farm` share: the terminal, JSON, the farm they talk to, and finding a batch or job in it."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from farm.client.batch import Batch
from farm.client.farm import Farm
from farm.errors import NotFound, ServiceUnavailable
from farm.jobs.records import AttemptInfo, BatchStatus, JobInfo
from farm.runtime.terminal_text import printable
from farm.settings import Settings

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Say it as JSON.")]


def complain(text: str) -> None:
    """A line on standard error for each line of what is wrong."""
    for line in text.splitlines():
        err.print(Text(f"farm: {printable(line)}"), soft_wrap=True)


def say_json(value: Any) -> None:
    """A value as JSON on standard output."""
    print(json.dumps(value, indent=2, default=str))


def home() -> Path:
    """The embedded farm's folder."""
    return Path(os.environ.get("FARM_HOME", ".farm"))


def open_farm() -> Farm:
    """The farm that commands talk to; raises `ServiceUnavailable` for an embedded one that does not run."""
    from farm.local import running
    from farm.local.home import SERVICE_VARIABLES

    settings = Settings.load()
    if not SERVICE_VARIABLES & os.environ.keys() and running(settings.home) is None:
        raise ServiceUnavailable(f"the farm in {settings.home.absolute()} does not run: start it with `farm up`")
    return Farm(settings)


def find(farm: Farm, which: str) -> Batch | JobInfo:
    """A batch by its name or id, or a job by its id; raises `NotFound`."""
    try:
        return farm.batch(which)
    except NotFound:
        try:
            return farm.job(which).info
        except NotFound:
            raise NotFound(f"there is no batch or job {which!r}; `farm status` lists the batches") from None


def batch_json(batch: BatchStatus) -> dict[str, Any]:
    """How far a batch is, as `--json` says it."""
    return {
        "batch": batch.id,
        "name": batch.name,
        "owner": batch.owner,
        "priority": batch.priority,
        "total": batch.total,
        "done": batch.done,
        "paused": batch.paused,
        "counts": {state.value: count for state, count in batch.counts.items()},
        "created_at": batch.created_at,
        "finished_at": batch.finished_at,
    }


def job_json(job: JobInfo) -> dict[str, Any]:
    """A job as `--json` says it."""
    return {
        "job": job.id,
        "index": job.index,
        "state": job.state.value,
        "attempt": job.attempt,
        "tries": job.tries,
        "worker": job.worker,
        "steps_done": job.steps_done,
        "seconds_per_step": job.seconds_per_step,
        "eta_seconds": job.eta_seconds,
        "error": job.error,
        "paused": job.paused,
        "not_before": job.not_before,
        "lost_leases": job.lost_leases,
        "reused_from": job.reused_from,
        "spec": job.spec.model_dump(mode="json"),
        "picture": vars(job.picture) if job.picture else None,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
    }


def attempt_json(attempt: AttemptInfo) -> dict[str, Any]:
    """An attempt that has ended as `--json` says it."""
    return {**vars(attempt), "seconds": attempt.seconds}

"""The commands that steer what was handed in: `show`, `cancel`, `pause`, `resume`, `retry`, `delete`."""

from collections.abc import Callable
from typing import Annotated

import typer
from rich.text import Text

from farm.cli.console import Json, attempt_json, err, find, job_json, open_farm, out, say_json
from farm.client.batch import Batch
from farm.client.farm import Farm
from farm.client.job import Job
from farm.client.owner import Owner
from farm.errors import NotEnded
from farm.jobs.records import JobInfo
from farm.jobs.states import JobState
from farm.runtime.terminal_text import printable
from farm.show.job_history import story

app = typer.Typer()

Which = Annotated[str | None, typer.Argument(metavar="BATCH|JOB", help="Its name or id.")]
Owned = Annotated[str | None, typer.Option("--owner", metavar="NAME", help="All batches of an owner instead.")]


@app.command()
def show(job_id: Annotated[str, typer.Argument(metavar="JOB", help="Its id.")], as_json: Json = False) -> None:
    """Tell a job's whole story: its spec, each attempt with its worker and its times, and where its picture is."""
    with open_farm() as farm:
        job = farm.job(job_id)
        attempts = job.attempts()
        if as_json:
            say_json({**job_json(job.info), "attempts": [attempt_json(one) for one in attempts]})
        else:
            place = f"s3://{farm.settings.s3_bucket}/{job.picture.key}" if job.picture else None
            out.print(story(job.info, attempts, place))


@app.command()
def cancel(which: Which = None, owner: Owned = None) -> None:
    """Cancel what has not ended of a batch, a job or an owner; what is being handed in meanwhile is not."""
    _steer(which, owner, lambda it: it.cancel(), "{} cancelled", "nothing to cancel: all have ended")


@app.command()
def pause(which: Which = None, owner: Owned = None) -> None:
    """Render nothing of a batch, a job or an owner until `farm resume`; what runs stops, and goes on from there."""
    _steer(which, owner, lambda it: it.pause(), "{} paused", "paused; no job of it is left to wait")


@app.command()
def resume(which: Which = None, owner: Owned = None) -> None:
    """Go on with what was paused."""
    _steer(which, owner, lambda it: it.resume(), "{} to go on with", "resumed; no job of it is left to go on with")


@app.command()
def retry(which: Which = None, owner: Owned = None) -> None:
    """Give the failed jobs of a batch, a failed job, or an owner's, all their tries anew."""
    _steer(which, owner, lambda it: it.retry(), "{} to be tried anew", "nothing has failed")


@app.command()
def delete(
    which: Annotated[list[str], typer.Argument(metavar="BATCH...", help="Their names or ids.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Those too that have not ended: cancel them first.")] = False,
) -> None:
    """Delete batches for good: every picture, everything beside it, and all that is known of their jobs."""
    with open_farm() as farm:
        batches = {batch.id: batch for batch in map(farm.batch, which)}
        going_on = 0
        for batch in batches.values():
            status = batch.status()
            left = status.total - status.ended
            going_on += bool(left)
            pictures, more = status.counts[JobState.SUCCEEDED], f", {left} of them not ended" if left else ""
            out.print(Text(printable(f"{batch.id}: {status.total} jobs{more}, {pictures} pictures")), soft_wrap=True)
        if going_on and not cancel:
            raise NotEnded("nothing was deleted: what has not ended is deleted with --cancel, or when it has")
        if not yes and not typer.confirm(f"delete {'this' if len(batches) == 1 else 'these'} for good?", err=True):
            raise typer.Exit(1)
        for batch in batches.values():
            with err.status(f"deleting {printable(batch.id)} …"):
                gone = batch.delete(cancel=cancel)
            later = "" if gone else "; the dispatcher deletes the rest of it when it can"
            out.print(Text(printable(f"{batch.id} deleted{later}")), soft_wrap=True)


def _steer(
    which: str | None, owner: str | None, move: Callable[[Batch | Job | Owner], int], done: str, nothing: str
) -> None:
    if (which is None) == (owner is None):
        raise typer.BadParameter("say a batch or a job, or an owner with --owner")
    with open_farm() as farm:
        count = int(move(farm.owner(owner or "") if which is None else _found(farm, which)))
    out.print(done.format(f"{count} job{'s' * (count != 1)}") if count else nothing)


def _found(farm: Farm, which: str) -> Batch | Job:
    found = find(farm, which)
    return farm.job(found.id) if isinstance(found, JobInfo) else found

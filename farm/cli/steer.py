"""The commands that change what happens to submitted jobs: `cancel`, `pause`, `resume`, `retry`, `delete`."""

from collections.abc import Callable
from typing import Annotated

import typer

from farm.cli.console import err, find, open_farm, out, plural, print_line
from farm.client.batch import Batch
from farm.client.job import Job
from farm.client.owner import Owner
from farm.errors import NotEnded
from farm.jobs.records import JobInfo
from farm.jobs.states import JobState
from farm.runtime.terminal_text import printable

app = typer.Typer()

Which = Annotated[
    str | None, typer.Argument(metavar="BATCH|JOB", help="A batch by its name or id, or a job by its id.")
]
OwnerName = Annotated[
    str | None, typer.Option("--owner", metavar="NAME", help="All batches of this owner, instead of one batch or job.")
]


@app.command()
def cancel(which: Which = None, owner: OwnerName = None) -> None:
    """Cancel the unfinished jobs of a batch, a job or an owner; a submission under way is not affected."""
    _steer(which, owner, lambda target: target.cancel(), "{} cancelled", "nothing to cancel: all have ended")


@app.command()
def pause(which: Which = None, owner: OwnerName = None) -> None:
    """Pause a batch, a job or an owner; running renders stop, and continue from there after `farm resume`."""
    _steer(which, owner, lambda target: target.pause(), "{} paused", "paused; none of its jobs is waiting")


@app.command()
def resume(which: Which = None, owner: OwnerName = None) -> None:
    """Resume a paused batch, job or owner."""
    _steer(which, owner, lambda target: target.resume(), "{} resumed", "resumed; none of its jobs is waiting")


@app.command()
def retry(which: Which = None, owner: OwnerName = None) -> None:
    """Retry the failed jobs of a batch or an owner, or a failed job, with the full number of tries."""
    _steer(which, owner, lambda target: target.retry(), "{} will be retried", "nothing has failed")


@app.command()
def delete(
    which: Annotated[list[str], typer.Argument(metavar="BATCH...", help="Batches, by their names or ids.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel unfinished jobs first.")] = False,
) -> None:
    """Delete batches for good, with their pictures, all other files and everything recorded about their jobs."""
    with open_farm() as farm:
        batches = {batch.id: batch for batch in map(farm.batch, which)}
        unfinished = False
        for batch in batches.values():
            status = batch.status()
            left = status.total - status.ended
            unfinished |= bool(left)
            more = f", {left} of them not ended" if left else ""
            print_line(f"{batch.id}: {status.total} jobs{more}, {status.counts[JobState.SUCCEEDED]} pictures")
        if unfinished and not cancel:
            raise NotEnded("nothing was deleted: some jobs have not ended; wait for them, or cancel them with --cancel")
        if not yes and not typer.confirm(f"delete {'this' if len(batches) == 1 else 'these'} for good?", err=True):
            raise typer.Exit(1)
        for batch in batches.values():
            with err.status(f"deleting {printable(batch.id)} …"):
                gone = batch.delete(cancel=cancel)
            later = "" if gone else "; the dispatcher deletes the rest of it when it can"
            print_line(f"{batch.id} deleted{later}")


def _steer(
    which: str | None, owner: str | None, change: Callable[[Batch | Job | Owner], int], done: str, nothing: str
) -> None:
    if (which is None) == (owner is None):
        raise typer.BadParameter("name a batch or a job, or an owner with --owner")
    with open_farm() as farm:
        if owner is not None:
            target: Batch | Job | Owner = farm.owner(owner)
        else:
            found = find(farm, which or "")
            target = farm.job(found.id) if isinstance(found, JobInfo) else found
        count = int(change(target))
    out.print(done.format(f"{count} {plural('job', count)}") if count else nothing)

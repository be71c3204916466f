"""The commands that print batches and jobs: `status`, `jobs`, `show`."""

from itertools import islice
from typing import Annotated

import typer

from farm.cli.console import BatchName, JobId, Json, find, open_farm, out, print_json
from farm.cli.notices import print_errors, warn_of_waiting
from farm.jobs.records import JobInfo
from farm.jobs.states import JobState
from farm.show.job_history import job_history
from farm.show.json_forms import attempt_json, batch_json, job_json
from farm.show.tables import batch_table, job_table

app = typer.Typer()

_FIRST_JOBS = 1000


@app.command()
def status(
    which: Annotated[
        str | None, typer.Argument(metavar="[BATCH|JOB]", help="A batch by its name or id, or a job by its id.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the newest batches, or one batch or job. The JSON of a batch has its first 1,000 jobs."""
    with open_farm() as farm:
        if which is None:
            batches = farm.batches()
            if as_json:
                print_json([batch_json(batch) for batch in batches])
            else:
                out.print(batch_table(batches) if batches else "no batches yet: `farm submit` submits one")
                warn_of_waiting(farm)
            return
        found = find(farm, which)
        if isinstance(found, JobInfo):
            print_json(job_json(found)) if as_json else out.print(job_table([found], whole=True))
        elif as_json:
            first = [job_json(job.info) for job in islice(found, _FIRST_JOBS)]
            print_json({**batch_json(found.status()), "jobs": first, "further": found.total > len(first)})
        else:
            out.print(batch_table([found.status()]))
            warn_of_waiting(farm, found.id)
            print_errors(found)


@app.command()
def jobs(
    which: BatchName,
    states: Annotated[
        list[JobState] | None, typer.Option("--state", help="Only jobs in this state; may be repeated.")
    ] = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="Only jobs with an error.")] = False,
    after: Annotated[int, typer.Option(min=0, help="Begin after the job at this place.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Print this many jobs at most.")] = 100,
    as_json: Json = False,
) -> None:
    """List the jobs of a batch, a page at a time."""
    with open_farm() as farm:
        batch = farm.batch(which)
        chosen = batch.wrong(limit) if wrong else islice(batch.jobs(after=after, states=states or ()), limit)
        found = [job.info for job in chosen]
    if as_json:
        print_json({"jobs": [job_json(job) for job in found], "after": found[-1].index if found else after})
    else:
        out.print(job_table(found) if found else "no such jobs")


@app.command()
def show(job_id: JobId, as_json: Json = False) -> None:
    """Print everything about a job: its spec, its attempts with their workers and times, and its picture."""
    with open_farm() as farm:
        job = farm.job(job_id)
        attempts = job.attempts()
        if as_json:
            print_json({**job_json(job.info), "attempts": [attempt_json(attempt) for attempt in attempts]})
        else:
            address = f"s3://{farm.settings.s3_bucket}/{job.picture.key}" if job.picture else None
            out.print(job_history(job.info, attempts, address))

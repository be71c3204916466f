"""Messages about a batch that several commands print: errors, jobs without a suitable worker, how to wait again."""

from collections.abc import Iterator
from contextlib import contextmanager

from farm.cli.console import complain, out, print_line
from farm.client.batch import Batch
from farm.client.farm import Farm
from farm.show.tables import job_table

_MOST_ERRORS = 20


def print_errors(batch: Batch) -> None:
    """Print the first jobs of a batch that have an error; reads no other jobs."""
    if found := [job.info for job in batch.wrong(_MOST_ERRORS + 1)]:
        out.print(job_table(found[:_MOST_ERRORS]))
        if len(found) > _MOST_ERRORS:
            print_line(f"… and more: farm jobs {batch.id} --wrong --limit 1000")


def warn_of_waiting(farm: Farm, batch_id: str | None = None) -> None:
    """Warn of jobs whose model no worker serves, or that are too large for every worker."""
    if missing := farm.unheld(batch_id):
        complain(f"no worker serves {', '.join(missing)} now; its jobs wait until one does (farm worker --models …)")
    for model, limit in farm.exceeded_limits(batch_id).items():
        guided = f" ({limit.pixels // limit.guidance.factor:,} with guidance)" if limit.guidance.field else ""
        most = f"{limit.pixels:,} pixels{guided}"
        complain(f"no worker has the memory for {model} beyond {most} now; larger jobs wait for one with more memory")


@contextmanager
def announce_interrupt(batch: Batch) -> Iterator[None]:
    """Print on Ctrl-C that the batch continues."""
    try:
        yield
    except KeyboardInterrupt:
        complain(f"{batch.id} goes on; `farm watch {batch.id}` waits again, `farm cancel {batch.id}` ends it")
        raise

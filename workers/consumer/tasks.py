"""The Celery task: it calls `render_job` and translates the outcome into Celery's task states."""

from celery import Celery
from celery.exceptions import Ignore, Retry

from farm.errors import FarmError, RenderHandedBack
from farm.queue.broker import RENDER_TASK
from workers.service.outcomes import Cancelled, Failed, HandedBack, LostLease, NothingToClaim, RenderOutcome, Succeeded
from workers.service.render_job import render_job
from workers.service.worker import Worker


def register(app: Celery, worker: Worker) -> None:
    """Make the render task known to this worker's app."""

    @app.task(name=RENDER_TASK, throws=(FarmError,))
    def render(job_id: str) -> str:
        return task_result(render_job(worker, job_id))


def task_result(outcome: RenderOutcome) -> str:
    """The task's result, as Flower shows it.

    Raises `Retry` for a job that continues with its next message, the error of a failed job, and `Ignore`, which sends
    no event, if another worker reports the end of the job.
    """
    match outcome:
        case Succeeded():
            return outcome.url
        case Cancelled():
            return "cancelled"
        case HandedBack():
            raise Retry(f"handed back: {outcome.why}", exc=RenderHandedBack(outcome.why))
        case Failed():
            raise outcome.error
        case LostLease() | NothingToClaim():
            raise Ignore

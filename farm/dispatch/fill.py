"""Fills Redis from the backlog, for the dispatcher and for clients that have just submitted a batch."""

from farm.errors import BrokerUnavailable
from farm.jobs.backlog import Backlog, Pass
from farm.jobs.workers import Workers
from farm.queue.broker import Broker


def fill(backlog: Backlog, workers: Workers, broker: Broker, window: int, *, copy: bool = True) -> Pass:
    """Move jobs from the backlog into Redis until each model has what its live workers need.

    With `copy`, jobs whose picture exists stay in the backlog for the copier. Raises `BrokerUnavailable` after it has
    returned the unpublished jobs to the backlog.
    """
    # Commit before publishing: a worker that receives a message before the commit has nothing to claim. If this
    # process dies between the two, `Dispatcher.recover` finds the jobs without a message.
    found = backlog.enqueue(window, slots=workers.slots(), copy=copy)
    if found.queued:
        try:
            broker.publish(found.queued)
        except BrokerUnavailable:
            backlog.unqueue([bell.job_id for bell in found.queued])
            raise
    return found

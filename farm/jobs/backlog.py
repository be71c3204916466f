"""`Backlog`: chooses which pending jobs are queued next, in serving order, and charges their batches and owners.

The cost of a pass depends on the batches with pending jobs and on the jobs that it moves, not on the length of the
backlog: an index finds the batches one by one, and only as many jobs of a batch are read as it has turns.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from farm.jobs import charges
from farm.jobs.backlog_pass import BacklogPass
from farm.jobs.conditions import in_state, models_in
from farm.jobs.costs import Costs
from farm.jobs.database import Database
from farm.jobs.fair_share import window
from farm.jobs.memory_limits import memory_limits
from farm.jobs.records import Doorbell
from farm.jobs.reuse import Works
from farm.jobs.schema import JobRow
from farm.jobs.states import JobState
from farm.jobs.transitions import UNQUEUE
from farm.jobs.workers import live_models
from farm.settings import Settings

_DISPATCH_LOCK = 0x66617264
_CORRECT_SECONDS = 1.0


@dataclass(frozen=True)
class Pass:
    """The result of a pass over the backlog."""

    queued: Sequence[Doorbell] = field(default_factory=list)
    """The jobs that are queued now, in serving order: their messages are published in this order."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """The job of the same work whose picture is copied, by the job that is not rendered."""


class Backlog:
    """Queues pending jobs and puts queued jobs back. Any number of processes may do so at once."""

    def __init__(self, db: Database, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._db = db
        self._lease_seconds = settings.lease_seconds
        self._starvation_seconds = settings.starvation_seconds
        self._most_queued = settings.most_queued
        self._clock = clock
        self._corrected_at = -math.inf
        self._costs = Costs()
        self._ahead: dict[tuple[str, str], int] = {}

    def enqueue(self, most: int, *, slots: Mapping[str, int] | None = None, copy: bool = False) -> Pass:
        """Queue pending jobs in serving order until each model's window is full.

        `most` is the largest window of a model; `slots`, the number of slots of each model's live workers, may reduce
        it. The caller publishes the messages after this has committed. With `copy`, a job whose picture exists is not
        rendered. A job waits while a duplicate is under way.
        """
        self._correct_charges()
        with self._db.write() as session:
            self._db.exclusive(session, _DISPATCH_LOCK)
            models = list(models_in(session, JobState.PENDING))
            if not models:
                return Pass()
            one_pass = BacklogPass(
                session,
                window=lambda model: most if slots is None else window(slots.get(model, 0), most),
                works=Works(session, self._lease_seconds, copy=copy),
                limits=memory_limits(live_models(session, self._lease_seconds)),
                costs=self._costs,
                ahead=self._ahead,
                starvation_seconds=self._starvation_seconds,
                most_queued=self._most_queued,
            )
            for model in models:
                one_pass.serve(model)
        return Pass(one_pass.queued, one_pass.works.copies)

    def unqueue(self, job_ids: Sequence[str]) -> int:
        """Put queued jobs back into the backlog: their messages were not published, or are lost; returns how many."""
        with self._db.write() as session:
            moved = session.execute(UNQUEUE.update.where(JobRow.id.in_(job_ids)).returning(JobRow.id)).all()
        return len(moved)

    def queued_models(self) -> list[str]:
        """Return the models that have queued jobs."""
        with self._db.read() as session:
            return list(models_in(session, JobState.QUEUED))

    def queued(self, model: str) -> list[str]:
        """Return the ids of a model's queued jobs; at most a window of them."""
        with self._db.read() as session:
            return list(session.scalars(sa.select(JobRow.id).where(in_state(JobState.QUEUED), JobRow.model == model)))

    def _correct_charges(self) -> None:
        """Correct the charges of jobs that have ended, in separate transactions, so that a pass stays short."""
        if self._clock() - self._corrected_at < _CORRECT_SECONDS:
            return
        self._corrected_at = self._clock()
        corrected = charges.MOST
        while corrected == charges.MOST:
            with self._db.write() as session:
                self._db.exclusive(session, _DISPATCH_LOCK)
                jobs = charges.correct(session)
            self._costs.outdated(jobs)
            corrected = len(jobs)

"""`JobStore`: all classes that read and write jobs in SQL.

Only these classes write the state of jobs. Every update matches the state that it leaves, and a worker's
update also its attempt: the second of two writers matches no row.
"""

from dataclasses import dataclass
from typing import Self

from farm.jobs.attempts import Attempts
from farm.jobs.backlog import Backlog
from farm.jobs.database import Database
from farm.jobs.deletions import Deletions
from farm.jobs.endings import Endings
from farm.jobs.leases import Leases
from farm.jobs.leftovers import Leftovers
from farm.jobs.overview import Overview
from farm.jobs.queries import Queries
from farm.jobs.reuse import Reuse
from farm.jobs.steering import Steering
from farm.jobs.submissions import Submissions
from farm.jobs.workers import Workers
from farm.settings import Settings


@dataclass(frozen=True)
class JobStore:
    """One class for each concern, all on the same database."""

    submissions: Submissions
    backlog: Backlog
    workers: Workers
    leases: Leases
    attempts: Attempts
    steering: Steering
    endings: Endings
    deletions: Deletions
    leftovers: Leftovers
    reuse: Reuse
    queries: Queries
    overview: Overview

    @classmethod
    def over(cls, db: Database, settings: Settings) -> Self:
        """Build all of them on a database."""
        return cls(
            submissions=Submissions(db),
            backlog=Backlog(db, settings),
            workers=Workers(db, settings),
            leases=Leases(db, settings),
            attempts=Attempts(db, settings),
            steering=Steering(db),
            endings=Endings(db),
            deletions=Deletions(db),
            leftovers=Leftovers(db),
            reuse=Reuse(db),
            queries=Queries(db),
            overview=Overview(db, settings),
        )

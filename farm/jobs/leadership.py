"""Leader election by a short lease in SQL, on the database's clock."""

import logging
import math
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from farm.jobs.database import Database, now, now_plus
from farm.jobs.schema import LeaderRow

log = logging.getLogger(__name__)

LEASE_SECONDS = 4.0
"""The time without a renewal after which another process takes over."""
RENEW_SECONDS = 1.0


DISPATCHER = "dispatcher"
"""The name of the dispatchers' election."""


@dataclass(frozen=True)
class Leader:
    """The process that leads."""

    host: str
    pid: int


def holder_of(name: str) -> sa.Select[str]:
    """The holder of the live lease under a name, by the database's clock."""
    return sa.select(LeaderRow.holder).where(LeaderRow.name == name, LeaderRow.until >= now())


def leader(db: Database, name: str) -> Leader | None:
    """Return the leader under a name; None if no lease is live by the database's clock."""
    with db.read() as session:
        holder = session.scalar(holder_of(name))
    if holder is None:
        return None
    host, pid, _ = holder.rsplit(":", 2)
    return Leader(host, int(pid))


class Leadership:
    """A process that takes part in a leader election.

    Leader election avoids duplicate work; correctness does not depend on it. Two processes may lead for a moment, if
    the first does not know yet that its lease has expired.
    """

    def __init__(
        self, db: Database, name: str, lease_seconds: float = LEASE_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._db = db
        self._name = name
        self._lease_seconds = lease_seconds
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.leads = False
        """Whether it held the lease when it last sought it."""
        self._clock = clock
        self._asked = -math.inf

    def keep(self) -> bool:
        """Return whether this process leads; seeks the lease at most once in `RENEW_SECONDS`."""
        if self._clock() - self._asked >= RENEW_SECONDS:
            self._asked = self._clock()
            self.seek()
        return self.leads

    def seek(self) -> bool:
        """Renew the lease, or take it if it is free; return whether this process holds it. One statement."""
        insert: Any = postgresql.insert if self._db.engine.dialect.name == "postgresql" else sqlite.insert
        lease = {"holder": self.holder, "until": now_plus(sa.literal(self._lease_seconds))}
        wanted = (
            insert(LeaderRow)
            .values(name=self._name, **lease)
            .on_conflict_do_update(
                index_elements=[LeaderRow.name],
                set_=lease,
                where=sa.or_(LeaderRow.holder == self.holder, LeaderRow.until < now()),
            )
            .returning(LeaderRow.holder)
        )
        led = self.leads
        try:
            with self._db.write() as session:
                self.leads = session.execute(wanted).one_or_none() is not None
        except BaseException:
            self.leads = False  # unknown
            raise
        if self.leads != led:
            log.info("%s holder=%s name=%s", "leading" if self.leads else "no longer leading", self.holder, self._name)
        return self.leads

    def resign(self) -> None:
        """Release the lease, so that another process can take it at once."""
        with self._db.write() as session:
            session.execute(sa.delete(LeaderRow).where(LeaderRow.name == self._name, LeaderRow.holder == self.holder))
        self.leads = False

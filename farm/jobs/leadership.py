"""Which of several processes acts: the holder of a short lease in SQL, by the database's clock."""

import logging
import math
import os
import secrets
import socket
import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from farm.jobs.database import Database, now, now_plus
from farm.jobs.schema import LeaderRow

log = logging.getLogger(__name__)

LEASE_SECONDS = 4.0
"""After how long without a renewal another one takes over."""
RENEW_SECONDS = 1.0


DISPATCHER = "dispatcher"
"""The name in which dispatchers lead."""


@dataclass(frozen=True)
class Leader:
    """The process that leads."""

    host: str
    pid: int


def leader(db: Database, name: str) -> Leader | None:
    """The process that leads under a name; None if no lease is live by the database's clock."""
    with db.read() as session:
        holder = session.scalar(sa.select(LeaderRow.holder).where(LeaderRow.name == name, LeaderRow.until >= now()))
    if holder is None:
        return None
    host, pid, _ = holder.rsplit(":", 2)
    return Leader(host, int(pid))


class Leadership:
    """One process's part in the election of who leads in something.

    It makes a farm with many dispatchers calm, not safe: two that lead for a moment, one of them without knowing that
    its lease ran out, must do no harm to each other.
    """

    def __init__(self, db: Database, name: str, lease_seconds: float = LEASE_SECONDS) -> None:
        self._db = db
        self._name = name
        self._lease_seconds = lease_seconds
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.leads = False
        """Whether it did when it last asked."""
        self._asked = -math.inf

    def keep(self) -> bool:
        """Whether it leads, asked once in `RENEW_SECONDS` however often this is called."""
        if time.monotonic() - self._asked >= RENEW_SECONDS:
            self._asked = time.monotonic()
            self.seek()
        return self.leads

    def seek(self) -> bool:
        """Renew the lease, or take it if nobody has it now; whether it is held. One statement."""
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
            self.leads = False  # nobody knows
            raise
        if self.leads != led:
            log.info("%s holder=%s name=%s", "leading" if self.leads else "no longer leading", self.holder, self._name)
        return self.leads

    def resign(self) -> None:
        """Let another take over at once."""
        with self._db.write() as session:
            session.execute(sa.delete(LeaderRow).where(LeaderRow.name == self._name, LeaderRow.holder == self.holder))
        self.leads = False

"""Concurrent transactions on PostgreSQL: none waits without end, and callers see no deadlock."""

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.errors import DatabaseUnavailable
from farm.jobs import database as db
from farm.jobs.database import Database
from farm.jobs.schema import OwnerRow
from farm.jobs.store import JobStore
from farm.settings import Settings
from tests.integration.conftest import wait_until

pytestmark = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)

OWNERS = ("ann", "ben")


@pytest.fixture(autouse=True)
def owners(database: Database) -> None:
    with database.write() as session:
        session.add_all(OwnerRow(name=name) for name in OWNERS)


@pytest.fixture
def frozen_soon(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """The same database by connections that may be idle in a transaction for only 0.3 s."""
    monkeypatch.setattr(db, "_FROZEN_SECONDS", 0.3)
    with closing(Database(database_url)) as database:
        yield database


def take(session: Session, owner: str) -> None:
    session.execute(sa.update(OwnerRow).where(OwnerRow.name == owner).values(weight=OwnerRow.weight + 1))


def waiting(database: Database) -> int:
    """Count the transactions of this database that wait for a lock."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with database.read() as session:
        return session.scalar(sa.text(query)) or 0


def test_a_deadlock_is_ended_by_doing_one_of_the_two_anew(database: Database) -> None:
    both, tries = threading.Barrier(2), []

    def take_both(*names: str) -> None:
        def change(session: Session) -> None:
            tries.append(names)
            take(session, names[0])
            if len(tries) <= 2:
                both.wait(30)
            take(session, names[1])

        database.written(change)

    threads = [threading.Thread(target=take_both, args=names) for names in (OWNERS, OWNERS[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with database.read() as session:
        assert session.scalars(sa.select(OwnerRow.weight)).all() == [3, 3]
    assert len(tries) == 3


def test_a_process_frozen_in_a_transaction_soon_loses_its_locks(database: Database, frozen_soon: Database) -> None:
    def freeze() -> None:
        with frozen_soon.write() as session:
            take(session, OWNERS[0])
            with database.write() as another:
                take(another, OWNERS[0])  # waits until the idle transaction has lost the lock

    with pytest.raises(DatabaseUnavailable):
        freeze()
    with database.read() as session:
        assert session.scalars(sa.select(OwnerRow.weight).order_by(OwnerRow.name)).all() == [2, 1]
    with frozen_soon.write() as session:
        take(session, OWNERS[0])


def test_a_pause_updates_an_owner_that_another_transaction_inserts(database: Database) -> None:
    store = JobStore.over(database, Settings(database_url="", broker_url="", s3_bucket=""))
    with database.write() as session:
        session.execute(sa.insert(OwnerRow).values(name="new", virtual_time=3.0))
        pausing = threading.Thread(target=store.steering.pause, kwargs={"owner": "new"})
        pausing.start()
        wait_until(lambda: waiting(database) == 1, "the other waits")
    pausing.join(30)
    with database.read() as session:
        row = session.get_one(OwnerRow, "new")
        assert (row.paused, row.virtual_time) == (True, 3.0)

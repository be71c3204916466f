"""Leader election: of two dispatchers one leads; when it dies, the other takes over."""

import time

from farm.client.farm import Farm
from farm.jobs.database import Database
from farm.jobs.leadership import LEASE_SECONDS, RENEW_SECONDS
from farm.jobs.schema import LeaderRow
from farm.jobs.store import JobStore
from farm.specs.spec import RenderSpec
from tests.integration.conftest import Crew, wait_until
from tests.servers import BOTH_KINDS_IN_TIME


def leader(database: Database) -> int:
    """Process id of the leader; 0 if there is none."""
    with database.read() as session:
        row = session.get(LeaderRow, "dispatcher")
        return int(row.holder.split(":")[1]) if row else 0


@BOTH_KINDS_IN_TIME
def test_a_dispatcher_that_is_killed_is_replaced_within_seconds(crew: Crew, database: Database, farm: Farm) -> None:
    store = JobStore.over(database, crew.settings)
    processes = {process.popen.pid: process for process in (crew.dispatcher(), crew.dispatcher())}
    wait_until(lambda: leader(database) in processes, "one leads")
    first = leader(database)
    batch_id = store.submissions.submit(
        "before", "me", 50, [RenderSpec(prompt="x")]
    )  # through the store: the client would queue it itself
    wait_until(lambda: store.backlog.queued("tiny") == [f"{batch_id}-1"], "the leader dispatches")
    processes.pop(first).kill()
    died = time.monotonic()
    inline = farm.submit("handed in while nobody leads")
    assert f"{inline.id}-1" in store.backlog.queued("tiny")
    later = store.submissions.submit("after", "me", 50, [RenderSpec(prompt="y")])
    wait_until(lambda: f"{later}-1" in store.backlog.queued("tiny"), "the other dispatches")
    took = time.monotonic() - died
    (survivor,) = processes
    assert leader(database) == survivor
    assert took < LEASE_SECONDS + RENEW_SECONDS + 15, f"{took:.1f} s"  # 15 s for a busy machine


def test_a_dispatcher_that_stops_in_good_order_is_replaced_at_once(crew: Crew, database: Database) -> None:
    processes = {process.popen.pid: process for process in (crew.dispatcher(), crew.dispatcher())}
    wait_until(lambda: leader(database) in processes, "one leads")
    assert processes.pop(leader(database)).stop() == 0
    (survivor,) = processes
    assert leader(database) in (0, survivor)  # it has resigned
    wait_until(lambda: leader(database) == survivor, "the other leads")

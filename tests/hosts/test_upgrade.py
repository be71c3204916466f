"""A rolling upgrade while a batch runs: first the schema, then one program after another."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from farm import __version__
from farm.jobs.states import Outcome
from tests.chaos.farm import Standing
from tests.chaos.test_chaos import look
from tests.hosts.farm import NODES, SERVICES, HostsFarm, hosts_farm
from tests.releases import NextRelease, next_release

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(400)]


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[HostsFarm]:
    with hosts_farm(tmp_path) as farm:
        yield farm


@pytest.fixture
def following(tmp_path: Path) -> NextRelease:
    return next_release(tmp_path / "next")


def test_a_farm_is_upgraded_while_a_batch_runs(farm: HostsFarm, following: NextRelease) -> None:
    early = farm.run_at(NODES[0], "workers", "--name", "early", cwd=following.folder, **following.env)
    assert (early.returncode, early.stdout) == (2, "")
    assert early.stderr.splitlines()[-1].startswith("farm worker: the database's schema is ")
    assert f"needs {following.revision}: run `farm migrate`" in early.stderr
    farm.say("a worker of the next release was refused before the migration")

    farm.wait_until(farm.busy, "something is rendered")
    migrated = farm.run_at(SERVICES, "farm", "migrate", cwd=following.folder, **following.env)
    assert migrated.returncode == 0, migrated.stderr
    done = farm.ended()
    farm.wait_until(lambda: farm.ended() > done + 5, "the old release works with the new schema")
    assert set(versions(farm).values()) == {__version__}
    farm.say("migrated")

    first = farm.workers[0]
    replaced(farm, first)
    assert versions(farm)[farm.worker_name(first)] == __version__
    farm.say("a worker of the old release was started anew beside the newer schema")

    for one in (*farm.dispatchers, *farm.workers):
        one.part = replace(one.part, cwd=following.folder, env={**one.part.env, **following.env})
        replaced(farm, one)
        farm.say(f"{one.name} is of the next release")
    assert set(versions(farm).values()) == {following.version}
    done = farm.ended()
    farm.wait_until(lambda: farm.ended() > done + 10, "the next release renders")

    evidence = look(farm, 120)
    for job_id, rows in evidence.attempts.items():
        *before, last = rows
        assert last.outcome == Outcome.SUCCEEDED, (job_id, last.outcome, last.reason)
        for row in before:
            assert row.outcome == Outcome.HANDED_BACK, evidence.story(job_id)
    rendered = {row.worker for rows in evidence.attempts.values() for row in rows if row.outcome == Outcome.SUCCEEDED}
    assert rendered == {farm.worker_name(one) for one in farm.workers}


def versions(farm: HostsFarm) -> dict[str, str]:
    """Version reported by each live worker."""
    return {one.name: one.version for one in farm.store.workers.all() if one.alive}


def replaced(farm: HostsFarm, one: Standing) -> None:
    """Drain a process and wait until its replacement works."""
    starts, said = one.starts, len(farm.logs()[one.name])
    one.drain()
    farm.wait_until(lambda: one.starts > starts, f"{one.name} has drained, and is started again")
    if one in farm.workers:
        name = farm.worker_name(one)
        farm.wait_until(lambda: " ready" in farm.logs()[one.name][said:] and name in versions(farm), f"{name} is there")
    else:
        farm.wait_until(lambda: "dispatching" in farm.logs()[one.name][said:], f"{one.name} dispatches")

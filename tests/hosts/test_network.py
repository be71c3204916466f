"""Unreachable hosts: a severed host does not block the others, loses no job, and resumes work afterwards."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from PIL import Image

from farm.jobs.states import Outcome
from farm.specs.spec import URGENT
from tests.chaos.client import hand_in
from tests.chaos.farm import LEASE_SECONDS, Standing
from tests.chaos.orders import order
from tests.chaos.test_chaos import look
from tests.gated import pixel
from tests.hosts.farm import DESK, SERVICES, HostsFarm, hosts_farm
from tests.hosts.network import Network

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(400)]

CUT_SECONDS = 2.5 * LEASE_SECONDS
Severed = Callable[[Network, str], AbstractContextManager[None]]
SEVERED: dict[str, Severed] = {"cut off": Network.cut, "deaf": Network.deaf, "mute": Network.mute}


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostsFarm]:
    """One farm for all tests, with a client that keeps submitting batches; every invariant is checked at the end."""
    with hosts_farm(tmp_path_factory.mktemp("hosts"), more_models="scenes=tiny") as farm:
        yield farm
        look(farm, 120)
        assert [one.starts for one in everybody(farm)] == [1] * 5, "no process exited and was restarted"


def everybody(farm: HostsFarm) -> list[Standing]:
    return [*farm.workers, *farm.dispatchers]


def test_pictures_come_to_the_clients_host(farm: HostsFarm, tmp_path: Path) -> None:
    wanted = farm.hand_in_at_desk("desk-1")
    farm.at_desk("watch", "desk-1")
    said = json.loads(farm.at_desk("get", "desk-1", "--out", str(tmp_path), "--manifest", "--json"))
    manifest = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    pictures = [Path(file) for file in said["files"] if not file.endswith(".jsonl")]
    assert len(manifest) == len(pictures) == len(wanted.specs)
    assert {entry["sha256"] for entry in manifest} == {sha256(path) for path in pictures}
    for spec, path in zip(wanted.specs, sorted(pictures), strict=True):
        with Image.open(path) as image:
            assert image.size == (spec.width, spec.height)
            drawn = image.getpixel((0, 0))
        assert all(abs(a - b) <= 1 for a, b in zip(drawn, pixel(spec.seed), strict=True))


def test_a_real_model_renders_on_the_nodes(farm: HostsFarm, tmp_path: Path) -> None:
    farm.journal.write("asks", "scenes", priority=50)
    farm.at_desk(
        "submit", "a red circle", "a blue square", "--model", "scenes", "--steps", "4", "--seeds", "0..2",
        "--name", "scenes", "--out", str(tmp_path),
    )  # fmt: skip
    pictures = sorted(path for path in tmp_path.glob("*.png") if path.stem != "contact_sheet")
    assert len({sha256(path) for path in pictures}) == 6
    # The final check accepts only pictures of the null pipeline.
    farm.at_desk("delete", "scenes", "--yes")
    assert not any("a-red-circle" in key for key in list(farm.storage.keys()))


@pytest.mark.parametrize(("way", "worker"), [("cut off", 0), ("deaf", 1), ("mute", 2)])
def test_a_worker_whose_host_is_severed_loses_its_jobs_in_time_and_works_on_afterwards(
    farm: HostsFarm, way: str, worker: int
) -> None:
    one = farm.workers[worker]
    ours = submitted_first(farm, way)
    farm.wait_until(lambda: sum(job_id.startswith(ours) for job_id in farm.holds(one)) > 1, "it renders some of these")
    with SEVERED[way](farm.network, farm.host(one)):
        held = {job_id: attempt for job_id, attempt in farm.holds(one).items() if job_id.startswith(ours)}
        farm.say(f"{farm.host(one)} is {way}, with {len(held)} jobs")
        began = time.monotonic()
        # When the link was cut, a job may just have ended, and a claim may have been in flight.
        gone = farm.hold_until(
            lambda: not set(held.items()) & set(farm.holds(one).items()), "its leases expire", 2 * LEASE_SECONDS
        )
        lost = {row.job_id for row in farm.attempts(set(held)) if row.attempt == held[row.job_id]}
        farm.say(f"its jobs were taken after {gone:.1f} s")
        assert gone < LEASE_SECONDS + 2
        farm.wait_until(lambda: all(ended(farm, job_id) for job_id in lost), "they end elsewhere", 30)
        farm.hold(CUT_SECONDS - (time.monotonic() - began))
        before = farm.ended_by(one)
    farm.say(f"{farm.host(one)} is back")
    again = farm.hold_until(lambda: farm.ended_by(one) - before >= 2, "it takes jobs again", 30)
    farm.say(f"{farm.host(one)} took jobs again after {again:.1f} s")
    # Some of the jobs may have ended just before; the worker itself noticed the lost leases of the others.
    outcomes = {row.job_id: row.outcome for row in farm.attempts(lost) if row.attempt == held[row.job_id]}
    assert set(outcomes.values()) - {Outcome.SUCCEEDED} == {Outcome.LOST}
    stopped = re.findall(r"lease not renewed, stopping job_id=(\S+)", farm.logs()[one.name])
    assert {job_id for job_id, outcome in outcomes.items() if outcome == Outcome.LOST} <= set(stopped)


def test_over_a_slow_network_that_loses_packets_pictures_come_and_nearly_every_attempt_succeeds(
    farm: HostsFarm, tmp_path: Path
) -> None:
    farm.wait_until(farm.busy, "something is rendered")
    with farm.network.slow(SERVICES, seconds=0.025, loss=0.01) as cable:
        farm.say("there and back, to the services' host or from it, takes 50 ms, and 1 % is lost each way")
        before = {one.name: farm.ended_by(one) for one in farm.workers}
        lost_before = sum(farm.ended_by(one, Outcome.LOST) for one in farm.workers)
        wanted = farm.hand_in_at_desk("slowly")
        farm.at_desk("watch", "slowly")
        farm.at_desk("get", "slowly", "--out", str(tmp_path))
        assert len(list(tmp_path.glob("*.png"))) == len(wanted.specs)
        farm.wait_until(
            lambda: all(farm.ended_by(one) > before[one.name] + 4 for one in farm.workers), "all nodes work"
        )
        assert cable.lost > 0
        ended = sum(farm.ended_by(one) - before[one.name] for one in farm.workers)
        lost = sum(farm.ended_by(one, Outcome.LOST) for one in farm.workers) - lost_before
    farm.say(f"{ended} attempts ended meanwhile, {lost} of them by a lost lease; {cable.lost} packets were lost")
    assert lost < ended / 10


def test_the_services_host_cut_off_from_all_costs_time_and_nothing_else(farm: HostsFarm) -> None:
    farm.wait_until(farm.busy, "something is rendered")
    with farm.network.cut(SERVICES):
        farm.say("all are cut off from the services")
        farm.hold(CUT_SECONDS)
    before = {one.name: farm.ended_by(one) for one in farm.workers}
    again = farm.hold_until(
        lambda: all(farm.ended_by(one) > before[one.name] for one in farm.workers), "all nodes take jobs again", 40
    )
    farm.say(f"all nodes took jobs again after {again:.1f} s")


def test_a_host_cut_off_in_the_middle_of_a_transaction_holds_nobody_up_for_long(farm: HostsFarm) -> None:
    holding = farm.stand_at(DESK, "holding", "tests.hosts.holding")
    holding.start()
    farm.wait_until(lambda: "holds the lock" in farm.logs()["holding"], "a pass is under way at the desk")
    with farm.network.cut(DESK):
        farm.say("the desk is cut off, in the middle of a pass of its dispatcher's")
        began = time.monotonic()
        hand_in(farm.farm, order(farm.seed, "meanwhile", farm.scale), farm.journal)
        farm.wait_until(lambda: farm.farm.batch("meanwhile").status().done, "jobs are dispatched again", 60)
        again = time.monotonic() - began
        farm.say(f"jobs were dispatched again, and done, after {again:.1f} s")
    holding.leave()
    holding.kill()


def submitted_first(farm: HostsFarm, name: str) -> tuple[str, ...]:
    """Submit some batches that are served before the client's; returns their ids."""
    orders = [order(farm.seed, f"{name} {number}", farm.scale, priority=URGENT - 1) for number in range(4)]
    for wanted in orders:
        assert hand_in(farm.farm, wanted, farm.journal)
    return tuple(farm.farm.batch(wanted.name).id for wanted in orders)


def ended(farm: HostsFarm, job_id: str) -> bool:
    return farm.farm.job(job_id).info.state.terminal


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

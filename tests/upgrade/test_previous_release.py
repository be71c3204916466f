"""A farm of the previous release, upgraded while it runs: both releases share the jobs, the pictures and the schema.

Everything is observed through the public client and the command line of either release.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
from PIL import Image, ImageChops

from farm.objects.storage import Storage
from farm.settings import Settings
from tests.integration.conftest import Process, wait_until
from tests.releases import previous_release, this_release
from tests.servers import fresh_bucket, fresh_database
from tests.upgrade.mixed import MixedFarm, Side

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

KIND = "postgresql"
"""The kind of database."""
BOTH = ["old", "new"]
CROSSED = pytest.mark.parametrize(("first", "second"), [("old", "new"), ("new", "old")])
"""Runs with the two releases in either role."""
PACE = "null:?seconds_per_step=0.03"


@pytest.fixture(scope="module")
def old_farm(
    request: pytest.FixtureRequest,
    embedded: Settings,
    bucket_maker: Storage,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[MixedFarm]:
    """A farm of the previous release alone: its schema, a dispatcher, two workers and a client."""
    folder = tmp_path_factory.mktemp("upgrade")
    with ExitStack() as undo:
        old = previous_release(folder / "previous")
        fields = undo.enter_context(fresh_bucket(embedded, bucket_maker))
        if request.module.KIND == "sqlite":
            database_url = f"sqlite:///{folder / 'farm.db'}"
        else:
            database_url = undo.enter_context(fresh_database(request.getfixturevalue("postgres")))
        with redis.Redis.from_url(embedded.broker_url) as client:
            client.flushall()
        settings = Settings.load(
            database_url=database_url,
            broker_url=embedded.broker_url,
            home=folder / "home",
            lease_seconds=5.0,
            beat_seconds=0.5,
            forward_sizes=folder / "forwards.json",
            **fields,
        )
        farm = MixedFarm(settings, folder, old, this_release(), undo)
        farm.run(farm.old, "migrate")
        farm.open_client(farm.old)
        farm.start_dispatcher(farm.old)
        for number in (1, 2):
            farm.start_worker(farm.old, f"old-{number}", models("old"))
        yield farm


@pytest.fixture(scope="module")
def farm(old_farm: MixedFarm) -> MixedFarm:
    """The farm after `farm migrate` of this release during a batch, with this release's dispatcher, workers and client.

    The programs of the previous release that ran before the migration still run.
    """
    farm = old_farm
    specs = [{"prompt": f"under way {n}", "model": "tiny"} for n in range(1000)]
    batch = farm.old.ask("submit", specs=specs, num_inference_steps=20)["batch"]

    def succeeded() -> int:
        counts: dict[str, int] = farm.old.ask("status", batch=batch)["counts"]
        assert not {"failed", "cancelled"} & counts.keys(), f"{counts} {farm.logged('ended job_id')}"
        return counts.get("succeeded", 0)

    wait_until(lambda: succeeded() >= 4, "the old farm renders", 120)
    farm.run(farm.new, "migrate")
    before = succeeded()
    assert before < len(specs), "the batch has ended before the migration"
    wait_until(lambda: succeeded() >= before + 4, "the old farm goes on against the new schema", 120)
    farm.open_client(farm.new)
    farm.start_dispatcher(farm.new)
    for number in (1, 2):
        farm.start_worker(farm.new, f"new-{number}", models("new"))
    wait_until(lambda: farm.ended_by(farm.new) > 0, "a new worker renders jobs of the old client", 120)
    assert succeeded() < len(specs), "the batch has ended before the new workers came"
    farm.new.ask("steer", what="batch", name=batch, verb="cancel")
    for side in farm.sides:
        wait_until(lambda side=side: side.ask("status", batch=batch)["done"], f"it ends for {side.name}")
    return farm


def models(side: str) -> str:
    """Return the models of a side's workers: one that both sides serve, and one that only this side serves."""
    return f"tiny={PACE},by-{side}={PACE}"


def batch_by_both(farm: MixedFarm, client: Side) -> dict[str, Any]:
    """Submit a batch of which workers of each release render half, with and without trajectories; wait for its end."""
    made = client.ask(
        "submit",
        specs=[
            {"prompt": f"{name} {trajectory}", "model": f"by-{name}", "seed": n, "trajectory": trajectory}
            for n, trajectory in enumerate([False, True, False])
            for name in BOTH
        ],
        name=f"by both, from {client.name}",
        num_inference_steps=6,
        reuse=False,
    )
    farm.wait_for_batch(client, made["batch"])
    found: dict[str, Any] = made
    return found


def differences(old: Any, new: Any, where: str) -> list[str]:
    """Return where the new release's JSON lacks or changes a value of the old one's; additional keys are allowed."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in old for line in differences(old[key], new.get(key, "gone"), f"{where}.{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for n, value in enumerate(old) for line in differences(value, new[n], f"{where}[{n}]")]
    return [] if old == new else [f"{where} is {old!r} for the old release and {new!r} for the new one"]


def test_the_releases_are_two(farm: MixedFarm) -> None:
    for side in farm.sides:
        versions = {name.partition("@")[0]: one["version"] for name, one in side.ask("workers").items()}
        wanted = {name: of.release.version for of in farm.sides for name in of.workers}
        assert {name: versions[name] for name in wanted} == wanted, f"as the {side.name} client reports them"


@pytest.mark.parametrize("client", BOTH)
def test_a_worker_of_the_old_release_starts_against_the_new_schema_and_serves(farm: MixedFarm, client: str) -> None:
    name = f"late-{client}"
    worker = farm.start_worker(farm.old, name, f"{name}={PACE}")
    made = farm.side(client).ask("submit", specs=[{"prompt": "late", "model": name}] * 3, num_inference_steps=5)
    farm.wait_for_batch(farm.side(client), made["batch"])
    assert worker.stop() == 0, worker.log.read_text()
    for side in farm.sides:
        assert not any(one.startswith(f"{name}@") for one in side.ask("workers")), side.name


@pytest.mark.parametrize("client", BOTH)
def test_workers_of_both_releases_render_a_batch_of_either_client(farm: MixedFarm, client: str) -> None:
    made = batch_by_both(farm, farm.side(client))
    rendered = Counter(farm.rendered_by(job) for job in made["jobs"])
    assert rendered == {"old": 3, "new": 3}


@pytest.mark.parametrize("client", BOTH)
def test_both_clients_find_the_same_pictures_and_trajectories(farm: MixedFarm, client: str) -> None:
    made = batch_by_both(farm, farm.side(client))
    for job in made["jobs"]:
        by = f"{job}, rendered by the {farm.rendered_by(job)} release"
        for call in ("files", "job", "attempts"):
            old, new = (side.ask(call, job=job) for side in farm.sides)
            assert differences(old, new, f"{call} of {by}") == []
        reported, old = farm.old.ask("job", job=job), farm.old.ask("files", job=job)
        assert old["png"] == reported["picture"]["sha256"], by
        if reported["spec"].get("trajectory"):
            assert len(old["frames"]) == 6, by
            assert old["last frame is the picture"], by
            assert len(old["downloaded"]) == 3, by
        else:
            assert len(old["downloaded"]) == 1, by
    wait_until(lambda: f"ended batch_id={made['batch']}" in farm.logged(made["batch"]), "its manifest is written")
    old, new = (side.ask("batch", batch=made["batch"]) for side in farm.sides)
    assert differences(old, new, made["batch"]) == []


def test_both_command_lines_say_and_fetch_the_same(farm: MixedFarm, tmp_path: Path) -> None:
    made = batch_by_both(farm, farm.new)
    batch, job = made["batch"], made["jobs"][0]
    for command in (["status", batch], ["jobs", batch], ["show", job], ["status", job], ["models"]):
        old, new = (json.loads(farm.run(side, *command, "--json")) for side in farm.sides)
        assert differences(old, new, " ".join(command)) == []
    fetched = {}
    for side in farm.sides:
        folder = tmp_path / side.name
        farm.run(side, "get", batch, "--out", str(folder), "--sheet")
        fetched[side.name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(fetched["old"]) == 6 + 2 * 2 + 1
    assert fetched["new"].keys() == fetched["old"].keys()
    assert [name for name, data in fetched["old"].items() if fetched["new"][name] != data] == []


@CROSSED
def test_a_render_goes_from_one_release_to_the_other_and_back(
    farm: MixedFarm, first: str, second: str, tmp_path: Path
) -> None:
    """With the shipped model: the first worker is killed, the second one stopped, and the picture is the same."""
    model = f"begun-by-{first}"
    steps = {"FARM_CHECKPOINT_STEPS": 10, "FARM_DRAIN_SECONDS": 0}
    here, there = farm.side(first), farm.side(second)
    begins = farm.start_worker(here, f"{model}-begins", f"{model}=tiny", **steps)
    spec = {"prompt": "a red circle", "model": model, "seed": 3, "scheduler": "dpmpp_2m", "num_inference_steps": 400}
    (job,) = there.ask("submit", specs=[spec], reuse=False)["jobs"]
    wait_until(lambda: f"checkpointed job_id={job} " in begins.log.read_text(), f"{job} has a checkpoint", 120)
    begins.kill()
    goes_on = farm.start_worker(there, f"{model}-goes-on", f"{model}=tiny", **steps)
    wait_until(lambda: f"checkpointed job_id={job} " in goes_on.log.read_text(), f"{job} has a checkpoint", 120)
    assert goes_on.stop() == 0, goes_on.log.read_text()
    ends = farm.start_worker(here, f"{model}-ends", f"{model}=tiny", **steps)
    found = farm.wait_for_job(there, job, lambda it: it["state"] == "succeeded", f"{job} has succeeded")
    assert 0 < resumed_at(goes_on, job) < resumed_at(ends, job), farm.logged(job)
    assert (found["attempt"], found["tries"]) == (3, 0), found
    outcomes = [one["outcome"] for one in here.ask("attempts", job=job)]
    assert outcomes == ["lost", "handed_back", "succeeded"], farm.logged(job)
    (whole,) = here.ask("submit", specs=[spec], reuse=False)["jobs"]
    pictures = []
    for side, one in ((here, job), (there, whole)):
        farm.wait_for_job(side, one, lambda it: it["state"] == "succeeded", f"{one} has succeeded")
        side.ask("save", job=one, path=str(tmp_path / f"{one}.png"))
        pictures.append(Image.open(io.BytesIO((tmp_path / f"{one}.png").read_bytes())))
    difference = ImageChops.difference(*pictures)
    assert max(most for _, most in difference.getextrema()) <= 1, f"{job} differs from {whole}"
    assert ends.stop() == 0, ends.log.read_text()


def resumed_at(worker: Process, job: str) -> int:
    """Return the step at which a worker resumed a job, according to its log; 0 if it started from the first step."""
    found = re.findall(rf"resuming job_id={job} .*step=(\d+)", worker.log.read_text())
    return int(found[-1]) if found else 0


@CROSSED
def test_a_client_pauses_resumes_and_cancels_what_the_other_releases_workers_render(
    farm: MixedFarm, first: str, second: str
) -> None:
    client, model = farm.side(first), f"by-{second}"
    spec = {"prompt": "long", "model": model, "num_inference_steps": 1000}
    made = client.ask("submit", specs=[spec], owner=f"steered-by-{first}")
    (job,) = made["jobs"]

    def under_way(job: str) -> None:
        farm.wait_for_job(client, job, lambda it: it["state"] == "running" and it["steps_done"] > 2, f"{job} runs")

    for what, name in (("job", job), ("batch", made["batch"]), ("owner", f"steered-by-{first}")):
        under_way(job)
        assert client.ask("steer", what=what, name=name, verb="pause") == 1, (what, name)
        farm.wait_for_job(client, job, lambda it: it["state"] == "pending", f"{job} pauses by its {what}")
        attempt = client.ask("attempts", job=job)[-1]
        assert (attempt["outcome"], attempt["reason"]) == ("handed_back", "paused"), attempt
        assert client.ask("steer", what=what, name=name, verb="resume") == 1, (what, name)
    under_way(job)
    assert max(resumed_at(worker, job) for worker in farm.side(second).workers.values()) > 0, farm.logged(job)
    assert client.ask("steer", what="job", name=job, verb="cancel")
    farm.wait_for_job(client, job, lambda it: it["state"] == "cancelled", f"{job} is cancelled")
    assert farm.side(second).ask("job", job=job)["state"] == "cancelled"


@CROSSED
def test_a_client_sees_previews_of_the_other_releases_workers(farm: MixedFarm, first: str, second: str) -> None:
    client, spec = farm.side(first), {"prompt": "seen", "model": f"by-{second}", "num_inference_steps": 1000}
    made = client.ask("submit", specs=[spec])
    shown = client.ask("preview", job=made["jobs"][0])
    assert 0 < shown["step"] < 1000
    assert shown["size"] == [8, 8], "its latents"
    assert client.ask("steer", what="batch", name=made["batch"], verb="cancel") == 1


@CROSSED
def test_a_failed_job_is_retried_by_the_other_releases_client(farm: MixedFarm, first: str, second: str) -> None:
    model = f"broken-{first}"
    worker = farm.start_worker(farm.side(first), model, f"{model}=/no/such/folder,whole-{first}={PACE}")
    made = farm.side(first).ask("submit", specs=[{"prompt": "x", "model": model}])
    (job,) = made["jobs"]
    client = farm.side(second)
    for attempt in (1, 2):
        found = farm.wait_for_job(
            client,
            job,
            lambda it, attempt=attempt: it["state"] == "failed" and it["attempt"] == attempt,
            f"{job} fails for the {attempt}. time",
        )
        assert "/no/such/folder" in found["error"], found
        if attempt == 1:
            assert client.ask("steer", what="batch", name=made["batch"], verb="retry") == 1
    assert [one["outcome"] for one in farm.side(first).ask("attempts", job=job)] == ["failed", "failed"]
    assert worker.stop() == 0, worker.log.read_text()


@pytest.mark.parametrize("leader", BOTH)
@pytest.mark.parametrize("renderer", BOTH)
def test_a_picture_of_either_release_is_copied_by_either_dispatcher(
    farm: MixedFarm, leader: str, renderer: str
) -> None:
    farm.let_lead(farm.side(leader))
    specs = [
        {
            "prompt": f"the same, by {renderer}, copied by {leader}",
            "model": f"by-{renderer}",
            "seed": 11,
            "trajectory": trajectory,
            "num_inference_steps": 5,
        }
        for trajectory in (False, True)
    ]
    originals = farm.other(renderer).ask("submit", specs=specs)
    farm.wait_for_batch(farm.other(renderer), originals["batch"])
    for client in farm.sides:
        copies = client.ask("submit", specs=specs)
        farm.wait_for_batch(client, copies["batch"])
        for original, copy in zip(originals["jobs"], copies["jobs"], strict=True):
            by = f"{copy} of {original}, submitted by {client.name}; {farm.logged(copy)}"
            assert client.ask("job", job=copy)["reused_from"] == original, by
            source = client.ask("files", job=original)
            for reader in farm.sides:
                found = reader.ask("files", job=copy)
                assert found["png"] == source["png"], f"{reader.name} reads {by}"
                assert found.get("frames") == source.get("frames"), f"{reader.name} reads {by}"
                assert [*found["downloaded"].values()] == [*source["downloaded"].values()], f"{reader.name} reads {by}"


@pytest.mark.parametrize("client", BOTH)
def test_a_batch_of_both_releases_is_deleted_by_either_client(farm: MixedFarm, client: str) -> None:
    made = batch_by_both(farm, farm.side(client))
    assert stored(farm, made["batch"])
    deleted = farm.side(client).ask("steer", what="batch", name=made["batch"], verb="delete")
    assert deleted is True
    for side in farm.sides:
        with pytest.raises(AssertionError, match="NotFound"):
            side.ask("status", batch=made["batch"])
        with pytest.raises(AssertionError, match="NotFound"):
            side.ask("job", job=made["jobs"][0])
    assert stored(farm, made["batch"]) == []


@pytest.mark.parametrize("renderer", BOTH)
def test_what_either_release_leaves_beside_its_pictures_is_swept_by_the_new_dispatcher(
    farm: MixedFarm, renderer: str
) -> None:
    farm.let_lead(farm.new)
    model = f"leaves-{renderer}"
    doomed = farm.start_worker(farm.side(renderer), f"{model}-doomed", f"{model}={PACE}", FARM_CHECKPOINT_STEPS=10)
    client = farm.other(renderer)
    spec = {"prompt": "left", "model": model, "num_inference_steps": 200}
    made = client.ask("submit", specs=[spec, {**spec, "num_inference_steps": 1000}])
    short, long = made["jobs"]
    wait_until(
        lambda: all(f"checkpointed job_id={job} " in doomed.log.read_text() for job in (short, long)),
        f"{short} and {long} have checkpoints",
        120,
    )
    doomed.kill()  # a killed worker can't delete anything itself
    heir = farm.start_worker(farm.side(renderer), f"{model}-heir", f"{model}={PACE}", FARM_CHECKPOINT_STEPS=10)
    found = farm.wait_for_job(client, short, lambda it: it["state"] == "succeeded", f"{short} has succeeded")
    assert client.ask("steer", what="job", name=long, verb="cancel")
    farm.wait_for_job(client, long, lambda it: it["state"] == "cancelled", f"{long} is cancelled")
    wanted = {found["picture"]["key"], f"{made['batch']}/manifest.jsonl"}
    wait_until(lambda: set(stored(farm, made["batch"])) == wanted, f"only {wanted} are left of {made['batch']}", 120)
    assert heir.stop() == 0, heir.log.read_text()


def test_nothing_is_left_in_the_bucket_that_no_client_knows(farm: MixedFarm) -> None:
    farm.let_lead(farm.new)

    def leftovers() -> list[str]:
        return [key for key in stored(farm) if ".checkpoint." in key or ".preview." in key]

    try:
        wait_until(lambda: not leftovers(), "no checkpoint and no preview is left", 60)
    except AssertionError:
        jobs = {key.rsplit(".", 3)[0] for key in leftovers()}
        raise AssertionError(f"left: {leftovers()}; {[farm.logged(job) for job in jobs]}") from None


def test_no_program_of_either_release_logged_a_traceback(farm: MixedFarm) -> None:
    assert list(farm.errors()) == []


def stored(farm: MixedFarm, batch: str = "") -> list[str]:
    """Return the keys in the bucket, or those of a batch."""
    storage = Storage(farm.settings)
    try:
        return list(storage.keys(f"{batch}/" if batch else ""))
    finally:
        storage.close()

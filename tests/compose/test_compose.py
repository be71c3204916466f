"""The unmodified docker-compose.yml: a farm in containers, used from outside."""

import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.compose import images
from tests.compose.engine import Engine, lacking, say
from tests.compose.project import PORTS, PROMETHEUS_PORT, Project
from tests.servers import missing

pytestmark = [pytest.mark.compose, pytest.mark.timeout(1500)]

FLOWER = f"http://127.0.0.1:{PORTS['FLOWER_PORT']}"
PROMETHEUS = f"http://127.0.0.1:{PROMETHEUS_PORT}"
FARM_SERVICES = ("dispatcher", "flower", "migrate", "worker")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """A Docker engine with the base and service images that the compose file needs."""
    why = lacking()
    if why:
        missing(why)
    engine = Engine()
    try:
        engine.start()
        images.collect_wheels()
        images.import_bases(engine)
        images.build_stand_ins(engine)
        yield engine
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def project(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The running farm, with images built from this checkout."""
    project = Project(engine, tmp_path_factory.mktemp("outside"))
    for target in ("worker", "migrate", "client"):
        project.compose("build", target)
        say(f"built the image of {target}")
    project.compose("up", "--detach")
    say("up")
    project.join()
    project.wait("a worker is there", project.workers)
    yield project
    project.compose("--profile", "prometheus", "--profile", "client", "down", "--volumes", "--timeout", "20")


def submitted(project: Project, name: str, count: int, steps: int) -> str:
    """Submit a batch of `count` jobs from outside; returns its id."""
    what = ["a red circle on a white background", "--seeds", f"0..{count - 1}", "--steps", str(steps), "--no-reuse"]
    batch: str = project.farm("submit", *what, "--name", name)["batch"]
    return batch


def counts(project: Project, batch: str) -> dict[str, int]:
    """Number of jobs in each state; states without jobs are left out."""
    found: dict[str, int] = project.farm("status", batch)["counts"]
    return {state: count for state, count in found.items() if count}


def attempts(project: Project, batch: str) -> list[tuple[str, str]]:
    """Worker and outcome of every ended attempt of the batch's jobs."""
    script = (
        "import json, sys; from farm import Farm; "
        "print(json.dumps([(a.worker, a.outcome) for job in Farm().batch(sys.argv[1]) for a in job.attempts()]))"
    )
    said = project.outside(sys.executable, "-c", script, batch).stdout
    return [(worker, outcome) for worker, outcome in json.loads(said)]


def rendering(project: Project, batch: str) -> dict[str, Any]:
    """Wait until a worker renders a job of the batch; returns its container."""

    def found() -> dict[str, Any] | None:
        names = {job["worker"] for job in project.farm("jobs", batch)["jobs"] if job["state"] == "running"}
        return next((one for one in project.running("worker") if worker_name(one) in names), None)

    container: dict[str, Any] = project.wait("a worker renders", found)
    return container


def worker_name(container: dict[str, Any]) -> str:
    """The farm's name of the worker in a container."""
    return f"cpu@{container['Config']['Hostname']}"


def began(project: Project, worker: str) -> str:
    """Start time of a live worker; empty if it is not alive."""
    script = (
        "import sys; from farm import Farm; "
        "print(*(one.started_at for one in Farm().workers() if one.alive and one.name == sys.argv[1]))"
    )
    return project.outside(sys.executable, "-c", script, worker).stdout.strip()


def test_the_migrations_ran_once_and_everything_else_becomes_healthy(project: Project) -> None:
    (migrate,) = project.containers("migrate")
    assert (migrate["State"]["Status"], migrate["State"]["ExitCode"]) == ("exited", 0)

    def unhealthy() -> list[str]:
        standing = [found for found in project.containers() if found["State"]["Status"] != "exited"]
        assert len(standing) == 6
        return [found["Name"] for found in standing if found["State"]["Health"]["Status"] != "healthy"]

    project.wait("all are healthy", lambda: not unhealthy())


def test_nothing_runs_with_rights_that_it_does_not_need(project: Project) -> None:
    for found in project.containers():
        if found["State"]["Running"]:
            shown = project.engine.docker("top", found["Id"], "-eo", "uid,pid").splitlines()[1:]
            assert "0" not in {line.split()[0] for line in shown}, found["Name"]
        assert found["Config"]["User"] not in ("", "0", "root"), found["Name"]
        host = found["HostConfig"]
        assert host["ReadonlyRootfs"], found["Name"]
        assert host["CapDrop"] == ["ALL"], found["Name"]
        assert "no-new-privileges:true" in host["SecurityOpt"], found["Name"]
        bound = [binding["HostIp"] for ports in host["PortBindings"].values() for binding in ports]
        assert set(bound) <= {"127.0.0.1"}, found["Name"]


def test_no_secret_stands_in_a_command_line(project: Project) -> None:
    secrets = [value for name, value in project.secrets.items() if name.endswith(("PASSWORD", "KEY"))]
    assert len(secrets) == 6
    for found in project.containers():
        if found["State"]["Running"]:
            shown = project.engine.docker("top", found["Id"], "-eo", "pid,args")
            assert not [secret for secret in secrets if secret in shown], found["Name"]


def test_the_clients_image_is_small_and_holds_nothing_that_renders(project: Project) -> None:
    sizes = {}
    for name in ("client", "server", "worker"):
        (image,) = json.loads(project.engine.docker("image", "inspect", f"diffusion-farm-{name}"))
        sizes[name] = image["Size"]
        assert image["Config"]["User"] == "10001:10001"
    (base,) = json.loads(project.engine.docker("image", "inspect", images.BASE))
    say(", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in {"base": base["Size"], **sizes}.items()))
    assert sizes["client"] - base["Size"] < 200e6 < sizes["worker"] - base["Size"]
    held = project.compose("run", "--rm", "-T", "--entrypoint", "pip", "client", "list", "--format=freeze").lower()
    assert "diffusion-farm==" in held
    assert not [name for name in ("torch==", "diffusers==", "numpy==", "flower==") if name in held]


def test_a_batch_from_outside_is_rendered_and_its_pictures_are_fetched(project: Project) -> None:
    out = project.folder / "out"
    ended = project.farm(
        *("submit", "a red circle on a white background", "a big blue star", "--seeds", "0..2", "--steps", "5"),
        *("--name", "outside", "--out", out),
    )
    assert ended["counts"]["succeeded"] == ended["total"] == 6
    pictures = [Path(project.folder, name) for name in ended["files"] if not name.endswith("contact_sheet.png")]
    assert len(pictures) == 6
    for picture in pictures:
        with Image.open(picture) as image:
            image.load()
            assert (image.format, image.size) == ("PNG", (64, 64))


def test_an_address_that_a_container_gives_away_leads_to_the_picture_from_outside(project: Project) -> None:
    script = "from farm import Farm; print(next(iter(Farm().batch('outside'))).url())"
    url = project.compose(
        *("run", "--rm", "-T", "-e", "FARM_OWNER=outside", "--entrypoint", "python", "client", "-c", script)
    ).strip()
    assert url.startswith(f"http://127.0.0.1:{PORTS['S3_PORT']}/farm/outside-")
    status, body = project.fetch(url)
    assert status == 200
    with Image.open(io.BytesIO(body.encode("latin-1"))) as image:
        assert image.size == (64, 64)
    assert project.fetch(url.partition("?")[0])[0] == 403


def test_a_batch_ends_though_a_workers_container_is_killed_in_the_middle(project: Project) -> None:
    project.compose("up", "--detach", "--no-recreate", "--scale", "worker=2", "worker")
    project.wait("two workers are there", lambda: len(project.workers()) == 2)
    batch = submitted(project, "killed", count=24, steps=60)
    victim = rendering(project, batch)
    name = worker_name(victim)
    project.engine.docker("kill", victim["Id"])
    say("killed it")
    project.wait("all have ended", lambda: counts(project, batch) == {"succeeded": 24}, seconds=300)
    assert (name, "lost") in attempts(project, batch)


def test_scaled_to_three_the_workers_share_a_batch(project: Project) -> None:
    project.compose("up", "--detach", "--no-recreate", "--scale", "worker=3", "worker")
    project.wait("three workers are there", lambda: len(project.workers()) == 3)
    batch = submitted(project, "shared", count=32, steps=40)
    project.wait("all have ended", lambda: counts(project, batch) == {"succeeded": 32}, seconds=300)
    assert {worker for worker, _ in attempts(project, batch)} == set(project.workers())


def test_a_worker_that_dies_comes_back_under_its_name(project: Project) -> None:
    victim = project.running("worker")[0]
    before = began(project, worker_name(victim))
    os.kill(victim["State"]["Pid"], 9)
    say("killed its process")
    project.wait("the worker is registered again", lambda: began(project, worker_name(victim)) not in ("", before))
    (again,) = [found for found in project.containers("worker") if found["Id"] == victim["Id"]]
    assert again["RestartCount"] == 1
    assert len(project.workers()) == 3


def test_a_worker_that_is_stopped_hands_its_jobs_back(project: Project) -> None:
    batch = submitted(project, "stopped", count=12, steps=200)
    victim = rendering(project, batch)
    name = worker_name(victim)
    asked = time.monotonic()
    project.engine.docker("stop", "--time", str(victim["Config"]["StopTimeout"]), victim["Id"])
    say(f"stopped in {time.monotonic() - asked:.0f} s")
    (stopped,) = [found for found in project.containers("worker") if found["Id"] == victim["Id"]]
    assert stopped["State"]["ExitCode"] == 0
    assert name not in project.workers()
    project.wait("all have ended", lambda: counts(project, batch) == {"succeeded": 12}, seconds=300)
    assert "lost" not in {outcome for _, outcome in attempts(project, batch)}


def test_flower_shows_the_batches_to_whoever_has_its_password(project: Project) -> None:
    assert project.fetch(f"{FLOWER}/api/tasks")[0] == 401
    status, body = project.fetch(f"{FLOWER}/api/tasks?limit=2000", f"farm:{project.secrets['FLOWER_PASSWORD']}")
    assert status == 200
    assert "shared" in body


def test_prometheus_scrapes_the_dispatcher_and_every_worker(project: Project) -> None:
    project.compose("--profile", "prometheus", "up", "--detach", "--no-recreate", "prometheus")

    def up() -> bool:
        status, body = project.fetch(f"{PROMETHEUS}/api/v1/targets?state=active")
        if status != 200:
            return False
        targets = json.loads(body)["data"]["activeTargets"]
        health = {target["scrapeUrl"]: target["health"] for target in targets}
        return len(health) == 1 + len(project.workers()) and set(health.values()) == {"up"}

    project.wait("Prometheus scrapes them all", up)
    _, body = project.fetch(f"{PROMETHEUS}/api/v1/query?query=farm_jobs")
    assert json.loads(body)["data"]["result"]


def test_taken_down_it_leaves_nothing_but_its_images(project: Project) -> None:
    project.compose("--profile", "prometheus", "--profile", "client", "down", "--volumes", "--timeout", "30")
    say("down")
    assert project.containers() == []
    assert project.engine.docker("volume", "ls", "--quiet").split() == []
    assert project.outside(sys.executable, "-m", "farm", "status", check=False).returncode == 3

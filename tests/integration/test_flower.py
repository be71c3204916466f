"""Flower, over REST and on its page: progress bars, a row per batch, search."""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from farm.cli.watch import Watcher
from farm.client.batch import Batch
from farm.client.farm import Farm
from farm.objects.storage import Storage
from farm.settings import Settings
from farm.show.farm_view import draw
from farm.show.progress_text import steps_line
from tests.integration.conftest import Crew, environment, wait_until
from tests.servers import missing

LOGIN = "watcher:let-me-see"


@dataclass
class Flower:
    """A Flower process started with the farm's module."""

    settings: Settings
    folder: Path
    port: int
    popen: subprocess.Popen[bytes] | None = None
    seen: dict[str, list[str]] = field(default_factory=dict)

    def start(self) -> None:
        env = environment(
            self.settings,
            FLOWER_PORT=self.port,
            FLOWER_BASIC_AUTH=LOGIN,
            FLOWER_DB=self.folder / "flower",
        )
        with (self.folder / "flower.log").open("ab") as log:
            self.popen = subprocess.Popen([sys.executable, "-m", "farm.queue.flower"], env=env, stdout=log, stderr=log)
        wait_until(self._answers, "Flower answers")

    def _answers(self) -> bool:
        try:
            return self.tasks("") is not None
        except OSError:
            return False

    def get(self, path: str, login: str | None = LOGIN) -> Any:
        token = base64.b64encode(login.encode()).decode() if login else ""
        headers = {"Authorization": f"Basic {token}"} if login else {}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read()

    def tasks(self, search: str) -> dict[str, dict[str, Any]]:
        return dict(json.loads(self.get(f"/api/tasks?search={urllib.parse.quote(search)}")))

    def task(self, task_id: str) -> dict[str, Any]:
        return self.tasks(task_id).get(task_id, {})

    def stop(self) -> None:
        assert self.popen is not None
        self.popen.terminate()
        self.popen.wait(20)


@pytest.fixture(scope="module")
def crew(
    embedded: Settings, bucket_maker: Storage, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Crew]:
    """A dispatcher and a worker with a slow model, on their own Redis database."""
    folder = tmp_path_factory.mktemp("watched")
    shutil.copyfile(sqlite_template, folder / "farm.db")
    settings = embedded.model_copy(
        update={
            "database_url": f"sqlite:///{folder / 'farm.db'}",
            "broker_url": embedded.broker_url.rpartition("/")[0] + "/7",
            "home": folder,
            "lease_seconds": 30.0,
            "beat_seconds": 0.4,
            "forward_sizes": folder / "forwards.json",
        }
    )
    crew = Crew(settings, folder)
    try:
        crew.dispatcher()
        crew.worker(models="slowly=null:?seconds_per_step=0.1,swiftly=null:", slots=4)
        yield crew
    finally:
        crew.end()


@pytest.fixture(scope="module")
def farm(crew: Crew) -> Iterator[Farm]:
    with Farm(crew.settings) as farm:
        yield farm


@pytest.fixture(scope="module")
def flower(crew: Crew) -> Iterator[Flower]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flower = Flower(crew.settings, crew.settings.home, port)
    flower.start()
    yield flower
    flower.stop()
    print((flower.folder / "flower.log").read_text()[-4000:])


@pytest.fixture(scope="module")
def watched(farm: Farm, flower: Flower) -> Batch:
    """A batch whose rows were polled over REST from its submission to its end."""
    batch = farm.submit(
        [
            {"prompt": "a lighthouse in fog", "num_inference_steps": 60},
            {"prompt": "a heron on one leg", "num_inference_steps": 90},
        ],
        name="sea at night",
        model="slowly",
    )
    ids = [batch.id, *(job.id for job in batch)]

    def ended() -> bool:
        for one in ids:
            task = flower.task(one)
            shown = f"{task.get('state')} {task.get('result')}"
            if task and shown not in flower.seen.setdefault(one, [])[-1:]:
                flower.seen[one].append(shown)
        return all(flower.seen.get(one, [""])[-1].startswith("SUCCESS") for one in ids)

    wait_until(ended, "Flower shows the batch and its jobs as succeeded")
    return batch


def test_a_running_render_has_a_bar_that_moves_and_then_says_where_its_picture_is(
    flower: Flower, watched: Batch
) -> None:
    for job in watched:
        shown = flower.seen[job.id]
        bars = [each.removeprefix("PROGRESS ") for each in shown if each.startswith("PROGRESS")]
        steps = [int(bar.rpartition(" ")[2].partition("/")[0]) for bar in bars]
        assert len(set(steps)) >= 2
        assert steps == sorted(steps)
        assert bars == [steps_line(step, job.spec.num_inference_steps) for step in steps]
        assert job.picture is not None
        assert shown[-1] == f"SUCCESS 's3://{watched._storage.bucket}/{job.picture.key}'"


def test_a_batch_has_a_row_of_its_own_with_what_is_done_its_rate_and_its_eta(flower: Flower, watched: Batch) -> None:
    row = flower.task(watched.id)
    assert (row["name"], row["state"]) == ("batch", "SUCCESS")
    assert row["kwargs"].startswith("sea at night: 2 jobs of ")
    assert row["result"].startswith(f"2/2 pictures in s3://{watched._storage.bucket}/{watched.id}/ after ")
    assert row["runtime"] == pytest.approx((watched.status().finished_at - watched.status().created_at).total_seconds())
    underway = [each for each in flower.seen[watched.id] if each.startswith("PROGRESS")]
    assert all(" 0/2 0%" in each or " 1/2 50%" in each for each in underway)
    assert any("ETA" in each and ("/s" in each or "/min" in each) for each in underway), underway


@pytest.mark.parametrize(
    ("words", "rows"),
    [('"sea at night"', 3), ('"lighthouse in fog"', 1), ("heron", 1), ("model slowly", 3), ("name:batch night", 1)],
)
def test_rows_are_found_by_batch_prompt_and_model(flower: Flower, watched: Batch, words: str, rows: int) -> None:
    found = [each for each in flower.tasks(words) if each.startswith(watched.id)]
    assert len(found) == rows


def test_without_the_password_there_is_nothing_to_see(flower: Flower, watched: Batch) -> None:
    for login in (None, "watcher:guess"):
        for path in ("/tasks", "/api/tasks", f"/task/{watched.id}"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                flower.get(path, login)
            assert refused.value.code == 401
            refused.value.close()


def test_a_render_that_is_paused_shows_that_it_is_and_goes_on_from_its_step(farm: Farm, flower: Flower) -> None:
    batch = farm.submit(["a slow snail"], name="paused", model="slowly", num_inference_steps=120)
    (job,) = batch
    wait_until(lambda: flower.task(job.id).get("state") == "PROGRESS", "its bar is there")
    batch.pause()
    wait_until(lambda: flower.task(job.id).get("state") == "RETRY", "its row says that it waits")
    wait_until(lambda: "paused" in str(flower.task(batch.id).get("result")), "the row of its batch says paused")
    stopped_at = int(str(flower.task(job.id)["result"]).rpartition(" ")[2].partition("/")[0])
    batch.resume()
    wait_until(lambda: flower.task(job.id).get("state") == "PROGRESS", "its bar goes on")
    assert int(str(flower.task(job.id)["result"]).rpartition(" ")[2].partition("/")[0]) >= stopped_at
    batch.wait(timeout=30)
    wait_until(lambda: flower.task(job.id).get("state") == "SUCCESS", "its end is there")
    assert ".a2.png" in flower.task(job.id)["result"]


def test_a_cancelled_batch_and_a_deleted_one_do_not_stay_under_way(farm: Farm, flower: Flower) -> None:
    batches = [
        farm.submit(["a castle"] * 3, name=name, model="nobody-has-it", num_inference_steps=2)
        for name in ("no", "gone")
    ]
    wait_until(lambda: all(flower.task(batch.id).get("state") == "PROGRESS" for batch in batches), "both are there")
    batches[0].cancel()
    batches[1].delete(cancel=True)
    wait_until(lambda: all(flower.task(batch.id).get("state") == "REVOKED" for batch in batches), "both have ended")
    assert "3 cancelled" in flower.task(batches[0].id)["result"]


def test_the_page_shows_the_bars(farm: Farm, flower: Flower, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        missing("no Chromium: apt-get install --no-install-recommends chromium")
    batch = farm.submit(["a kite"] * 3, name="on the page", model="slowly", num_inference_steps=300)
    wait_until(lambda: all("█" in str(flower.task(job.id).get("result")) for job in batch), "its bars have begun")
    try:
        dom = subprocess.run(
            [
                chromium,
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
                f"--user-data-dir={tmp_path / 'profile'}",
                "--virtual-time-budget=5000",
                "--dump-dom",
                f"http://{LOGIN}@127.0.0.1:{flower.port}/tasks",
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env={**os.environ, "HOME": str(tmp_path)},
        ).stdout
    finally:
        batch.cancel()
    assert dom.count("on the page") >= 4
    assert dom.count("/300") >= 3
    assert "█" in dom
    assert "0/3 0%" in dom


def test_a_watcher_sees_what_the_workers_hold_and_do(farm: Farm) -> None:
    batch = farm.submit(["a kite"] * 2, name="at work", model="slowly", num_inference_steps=900)

    def measured() -> bool:
        now = farm.loads().values()  # jobs that the test before cancelled may still run
        return [load.renders for load in now] == [2] and all(load.seconds_per_step for load in now)

    wait_until(measured, "its steps are measured")
    ((name, load),) = farm.loads().items()
    (worker,) = [one for one in farm.workers() if one.name == name]
    assert (load.renders, worker.held) == (2, ("slowly", "swiftly"))
    assert load.seconds_per_step is not None
    assert 0.09 < load.seconds_per_step < 5
    assert worker.memory is not None
    assert 0 < worker.memory[0] < worker.memory[1]
    (status,) = [each for each in farm.moving() if each.id == batch.id]
    assert farm.tempo(status).eta_seconds is not None
    file = io.StringIO()
    Console(file=file, width=160).print(draw(Watcher(farm).read(), 160))
    assert all(words in file.getvalue() for words in (batch.id, "2 running", "2/4", "slowly, swiftly"))
    batch.cancel()


def test_what_it_has_seen_is_still_there_after_a_restart(flower: Flower, watched: Batch) -> None:
    before = flower.tasks('"sea at night"')
    flower.stop()
    flower.start()
    after = flower.tasks('"sea at night"')
    shown = ("name", "state", "result", "kwargs", "runtime")
    assert {one: [before[one][name] for name in shown] for one in before} == {
        one: [after[one][name] for name in shown] for one in after
    }
    assert len(after) == 3
    wait_until(lambda: flower.get("/tasks") is not None, "its page is there")


def test_a_render_that_ends_while_its_worker_drains_is_shown_as_ended(crew: Crew, farm: Farm, flower: Flower) -> None:
    worker = crew.worker("leaving", models="leaving=null:?seconds_per_step=0.1")
    batch = farm.submit(["a last wave"], name="drained", model="leaving", num_inference_steps=60)
    (job,) = batch
    wait_until(lambda: flower.task(job.id).get("state") == "PROGRESS", "its bar is there")
    worker.stop()
    assert job.refresh().state == "succeeded"
    wait_until(lambda: flower.task(job.id).get("state") == "SUCCESS", "its end is there")

"""A user's farm: `farm up`, the command line, the pictures, and recovery after processes die."""

import base64
import csv
import json
import os
import signal
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
import redis
from PIL import Image

from farm import Farm, JobState, RenderSpec, Settings
from farm.specs.object_keys import manifest_key
from tests.acceptance.conftest import ROOT, UserFarm
from tests.integration.conftest import wait_until
from workers.outputs import png
from workers.tiny import checker

PROMPTS = ROOT / "examples" / "prompts.csv"


def right(paths: Iterable[Path]) -> float:
    """Return the share of pictures that show what the prompt in their metadata says."""
    verdicts = []
    for path in paths:
        with Image.open(path) as image:
            verdicts.append(checker.check(image.convert("RGB"), png.read(image)["spec"]["prompt"]).right)
    return sum(verdicts) / len(verdicts)


def client(user: UserFarm) -> Farm:
    return Farm(Settings.load(home=user.folder / ".farm"))


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.long)])
def test_a_file_of_prompts_becomes_pictures_that_show_what_was_asked(user: UserFarm, every: int) -> None:
    header, *lines = PROMPTS.read_text().splitlines(keepends=True)
    file = user.folder / "prompts.csv"
    file.write_text("".join([header, *lines[::every]]))
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    done = user.farm("submit", file, "--wait", "--out", "out", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["counts"]["succeeded"] == said["total"] == len(rows) >= 20
    pictures = sorted((user.folder / "out").glob("0*.png"))
    assert len(pictures) == len(rows)
    for path, row in zip(pictures, rows, strict=True):
        with Image.open(path) as image:
            assert image.text["parameters"].startswith(row["prompt"])
            spec = RenderSpec.model_validate(png.read(image)["spec"])
            assert (spec.prompt, spec.seed) == (row["prompt"], int(row["seed"]))
            assert image.size == (64, 64)
    assert right(pictures) >= 0.9
    with Image.open(user.folder / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > 500


def test_the_commands_find_the_farm_and_say_what_there_is(user: UserFarm) -> None:
    done = user.farm("submit", "a red circle on a white background", "--name", "sea", "--steps", "3", "--wait")
    assert done.returncode == 0, done.stderr
    assert "1 succeeded" in done.stdout
    assert "sea-" in user.farm("status").stdout
    job = json.loads(user.farm("status", "sea", "--json").stdout)["jobs"][0]
    assert json.loads(user.farm("status", job["job"], "--json").stdout)["picture"]["width"] == 64
    assert user.farm("get", job["job"], "--out", "one").returncode == 0
    assert len(list((user.folder / "one").glob("*.png"))) == 1
    assert "1 picture in sea.html" in user.farm("report", "sea", "--out", "sea.html").stdout
    assert "a red circle on a white background" in (user.folder / "sea.html").read_text()
    watched = user.farm("watch", "--once").stdout
    assert "sea-" in watched
    assert "worker-1@" in watched
    assert json.loads(user.farm("models", "--json").stdout)["tiny"]["workers"]
    assert "nothing to cancel" in user.farm("cancel", "sea").stdout
    healthy = user.farm("doctor")
    assert healthy.returncode == 0, healthy.stdout


def test_the_same_spec_gives_the_same_picture(user: UserFarm) -> None:
    spec = RenderSpec(prompt="a red heart on a black background", seed=11, num_inference_steps=8, scheduler="euler_a")
    with client(user) as farm:
        first, second = (next(iter(farm.submit([spec], reuse=False))).image() for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_flower_shows_a_render_by_batch_and_prompt_with_its_worker_and_runtime(user: UserFarm) -> None:
    assert user.farm("submit", "a blue star", "--name", "in-flower", "--steps", "3", "--wait").returncode == 0
    access = json.loads((user.folder / ".farm" / "farm.json").read_text())
    secret = base64.b64encode(f"{access['flower_user']}:{access['flower_password']}".encode()).decode()

    def tasks() -> list[dict[str, object]]:
        request = urllib.request.Request(
            f"{access['flower_url']}/api/tasks?search=in-flower", headers={"Authorization": f"Basic {secret}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            # The batch has a row of its own.
            return [task for task in json.load(answer).values() if task["name"] == "render"]

    wait_until(lambda: [task["state"] for task in tasks()] == ["SUCCESS"], "Flower has seen the render succeed")
    (task,) = tasks()
    assert task["kwargs"] == "in-flower 1/1: a blue star (model tiny)"
    assert str(task["worker"]).startswith("worker-1@")
    assert float(str(task["runtime"])) > 0
    assert "00001-a-blue-star.a1.png" in str(task["result"])


def test_bad_input_is_all_named_and_nothing_is_submitted(user: UserFarm) -> None:
    (user.folder / "bad.csv").write_text("prompt,seed,width\na,1,64\nb,-1,65\nc,x,64\n")
    before = user.farm("status", "--json").stdout
    done = user.farm("submit", "bad.csv", "--wait")
    assert done.returncode == 2
    for place in ("bad.csv:3: width", "bad.csv:3: seed", "bad.csv:4: seed"):
        assert place in done.stderr
    assert "Traceback" not in done.stderr
    assert user.farm("status", "--json").stdout == before


def test_a_second_farm_in_the_same_home_is_refused(user: UserFarm) -> None:
    second = user.farm("up")
    assert second.returncode == 2
    assert "already runs" in second.stderr
    assert user.farm("doctor").returncode == 0


@pytest.mark.long
def test_the_only_worker_killed_mid_batch_is_restarted_and_nothing_is_lost_or_done_twice(user: UserFarm) -> None:
    with client(user) as farm:
        batch = farm.submit(["a red circle"] * 16, name="killed", num_inference_steps=40)
        wait_until(lambda: batch.status().counts[JobState.RUNNING] >= 4, "jobs running")
        first = user.pid("worker-1")
        os.kill(first, signal.SIGKILL)
        assert batch.wait(120).counts[JobState.SUCCEEDED] == 16
        assert user.pid("worker-1") != first
        user.hear("worker-1")
        kept = {job.picture.key for job in batch if job.picture} | {manifest_key(batch.id)}
        wait_until(lambda: set(farm._storage.keys(f"{batch.id}/")) <= kept, "nothing but pictures is left")
        assert {job.info.tries for job in batch} == {0}
        assert max(job.info.attempt for job in batch) == 2


@pytest.mark.long
def test_redis_flushed_mid_batch_loses_nothing(user: UserFarm) -> None:
    with client(user) as farm:
        batch = farm.submit(["a red circle"] * 40, name="flushed", num_inference_steps=10)
        wait_until(lambda: batch.status().counts[JobState.RUNNING] >= 1, "jobs running")
        with redis.Redis.from_url(farm.settings.broker_url) as server:
            server.flushall()
        assert batch.wait(120).counts[JobState.SUCCEEDED] == 40


def test_the_readmes_client_code_runs_as_it_stands(user: UserFarm, monkeypatch) -> None:
    block = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(user.folder)
    exec(compile(block, "README.md", "exec"), {})
    assert len(list((user.folder / "out" / "first").glob("0*.png"))) == 2
    assert (user.folder / "out" / "first" / "sheet.png").exists()


@pytest.mark.long
def test_a_restart_keeps_everything_and_a_stop_leaves_no_process(user: UserFarm) -> None:
    before = json.loads(user.farm("status", "--json").stdout)
    processes = user.processes()
    assert user.down() == 0
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    stopped = user.farm("submit", "a red circle")
    assert stopped.returncode == 3
    assert stopped.stderr.count("\n") == 1
    assert "farm up" in stopped.stderr
    user.up()
    assert json.loads(user.farm("status", "--json").stdout) == before
    assert user.farm("submit", "a red circle", "--steps", "3", "--wait").returncode == 0


def test_services_that_do_not_answer_are_one_line_and_exit_3(user: UserFarm) -> None:
    nowhere = {
        "FARM_DATABASE_URL": "postgresql://u:secret@127.0.0.1:1/x",
        "FARM_BROKER_URL": "redis://:secret@127.0.0.1:1/0",
        "FARM_S3_BUCKET": "b",
        "FARM_S3_ENDPOINT_URL": "http://127.0.0.1:1",
    }
    for command in (["status"], ["submit", "a cat"], ["models"], ["cancel", "x"]):
        done = user.farm(*command, **nowhere)
        assert done.returncode == 3
        assert done.stderr.count("\n") == 1
        assert "secret" not in done.stderr
    database = {"FARM_DATABASE_URL": f"sqlite:///{user.folder / '.farm' / 'farm.db'}"}
    done = user.farm("submit", "a cat", **{**nowhere, **database})
    assert done.returncode == 3
    assert "Redis at 127.0.0.1:1" in done.stderr

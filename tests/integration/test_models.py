"""A worker's models: how they are named, and how a pushed model is fetched, verified and rendered."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from farm.client.farm import Farm
from farm.errors import ModelError
from farm.jobs.states import JobState
from farm.settings import Settings
from tests.checkpoints import build_checkpoint
from tests.forked import run_forked
from tests.integration.conftest import Crew, environment
from workers.models.opener import model_sources


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One kind of database is enough here."""
    return sqlite_url


class Hub(ThreadingHTTPServer):
    """A model hub that must get no requests."""

    asked: ClassVar[list[str]] = []


class _Asked(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        Hub.asked.append(self.path)
        self.send_error(500)

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(("127.0.0.1", 0), _Asked) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def test_models_are_named_or_name_themselves(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    listed = f"tiny, sd=/models/sd15,org/name,s3://bucket/models/theirs/,{folder},null:?width=128,farm:sd15,x=farm:sd15@abcdef"
    assert model_sources(listed) == {
        "tiny": "tiny",
        "sd": "/models/sd15",
        "org/name": "org/name",
        "theirs": "s3://bucket/models/theirs/",
        "mine": str(folder),
        "null": "null:?width=128",
        "sd15": "farm:sd15",
        "x": "farm:sd15@abcdef",
    }


@pytest.mark.parametrize(("listed", "said"), [("", "no models"), ("a=x,a=y", "two models"), ("a=", "not name=source")])
def test_a_list_of_models_that_makes_no_sense_is_refused(listed: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        model_sources(listed)


def test_a_model_that_was_pushed_is_pinned_fetched_and_rendered_without_any_hub(
    farm: Farm, crew: Crew, settings: Settings, tmp_path: Path, hub: Hub
) -> None:
    checkpoint = build_checkpoint(tmp_path / "checkpoint")
    env = environment(crew.settings, COLUMNS=200)

    def models(*arguments: str) -> str:
        done = run_forked("farm", "models", *arguments, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    pushed = models("push", str(checkpoint), "small")
    assert "workers pin it with --models small=farm:small" in pushed
    (listed,) = json.loads(models("list", "--json"))
    assert (listed["name"], listed["family"]) == ("small", "StableDiffusionPipeline")

    version = listed["version"]
    shown = models("list")
    assert re.search(rf"small +{version[:12]} +StableDiffusionPipeline +[\d.]+ [kM]B +\d{{4}}-", shown), shown
    sources = f"farm:small,theirs=s3://{settings.s3_bucket}/models/small,mine=farm:small@{version}"
    air_gapped = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": tmp_path / "hub"}
    worker = crew.worker(
        "w1", sources, FARM_MODEL_CACHE=tmp_path / "cache", FARM_MODEL_CACHE_SIZE="1GB", fresh=True, **air_gapped
    )
    each = [{"prompt": "a cat", "model": model} for model in ("small", "theirs", "mine")]
    batch = farm.submit(each, num_inference_steps=2, scheduler="euler_a", seed=1, reuse=False, name="models")
    assert batch.wait(60).counts[JobState.SUCCEEDED] == 3
    held = {model.name: model.sha256 for model in farm.workers()[0].models}
    assert held == dict.fromkeys(("small", "theirs", "mine"), version)
    for job in batch:
        assert job.picture is not None
        assert job.picture.model_sha256 == version
        assert job._repr_png_() == job.png()  # what a notebook shows
    assert worker.log.read_text().count("fetched ") == 1
    assert hub.asked == []

    assert batch.delete()
    assert json.loads(models("list", "--json")) == [listed]

    assert models("delete", "small", "--yes") == "small deleted\n"


def test_a_worker_whose_object_store_is_away_ends_as_one_that_may_be_started_again(crew: Crew, tmp_path: Path) -> None:
    process = crew.start_worker(
        "w1", "farm:small", FARM_MODEL_CACHE=tmp_path / "cache", FARM_S3_ENDPOINT_URL="http://127.0.0.1:1"
    )
    assert process.popen.wait(60) == 3
    assert "can't fetch farm:small" in process.log.read_text()


def test_a_worker_whose_model_can_not_be_loaded_says_so_and_ends(crew: Crew, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    process = crew.start_worker("w1", f"broken={tmp_path / 'empty'}")
    assert process.popen.wait(60) == 2
    said = process.log.read_text()
    assert "farm worker: model 'broken'" in said
    assert "model_index.json" in said
    assert "Traceback" not in said

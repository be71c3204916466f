"""A worker's models: what they are called, and that one in S3 is fetched, checked and rendered."""

from pathlib import Path

import pytest

from farm.client import Farm
from farm.errors import ModelError
from farm.settings import Settings
from farm.states import JobState
from farm.storage import Storage
from tests.checkpoints import build_checkpoint
from tests.integration.conftest import Crew
from workers.lifecycle import fetched, model_sources


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One kind of database is enough here."""
    return sqlite_url


def test_models_are_named_or_name_themselves(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    listed = f"tiny, sd15=/models/sd15,org/name,s3://bucket/models/theirs/,{folder},null:?width=128"
    assert model_sources(listed) == {
        "tiny": "tiny",
        "sd15": "/models/sd15",
        "org/name": "org/name",
        "theirs": "s3://bucket/models/theirs/",
        "mine": str(folder),
        "null": "null:?width=128",
    }


@pytest.mark.parametrize(("listed", "said"), [("", "no models"), ("a=x,a=y", "two models"), ("a=", "not name=source")])
def test_a_list_of_models_that_makes_no_sense_is_refused(listed: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        model_sources(listed)


def test_a_model_in_s3_is_fetched_once_and_rendered(farm: Farm, crew: Crew, settings: Settings, tmp_path: Path) -> None:
    checkpoint = build_checkpoint(tmp_path / "checkpoint")
    storage = Storage(settings)
    for path in checkpoint.rglob("*"):
        if path.is_file():
            storage.put(f"models/small/{path.relative_to(checkpoint).as_posix()}", path.read_bytes())
    source = f"s3://{settings.s3_bucket}/models/small"
    worker = crew.worker("w1", source, FARM_MODEL_CACHE=tmp_path / "cache")
    batch = farm.submit(["a cat"], model="small", num_inference_steps=2, scheduler="euler_a")
    assert batch.wait(60).counts[JobState.SUCCEEDED] == 1
    (job,) = batch
    (held,) = farm.workers()[0].models
    assert job.picture is not None
    assert job.picture.model_sha256 == held["sha256"]
    assert job._repr_png_() == job.png()  # what a notebook shows
    assert "fetched" in worker.log.read_text()

    kept = Path(fetched(source, storage, tmp_path / "cache"))
    (kept / "model_index.json").unlink()
    assert Path(fetched(source, storage, tmp_path / "cache") + "/model_index.json").exists()
    with pytest.raises(ModelError, match="nothing under"):
        fetched(f"s3://{settings.s3_bucket}/models/gone", storage, tmp_path / "cache")
    storage.close()


def test_a_worker_whose_model_can_not_be_loaded_says_so_and_ends(crew: Crew, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    process = crew.start_worker("w1", f"broken={tmp_path / 'empty'}")
    assert process.popen.wait(60) == 2
    said = process.log.read_text()
    assert "farm worker: model 'broken'" in said
    assert "model_index.json" in said
    assert "Traceback" not in said

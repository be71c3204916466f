"""A job too large for every worker: submit and status report it, and a worker that starts later renders it."""

from contextlib import closing
from pathlib import Path

import pytest

from farm.client.farm import Farm
from farm.jobs.served_models import ServedModel
from farm.jobs.states import JobState
from farm.objects.model_store import ModelStore
from farm.objects.storage import Storage
from farm.specs.spec import RenderSpec
from tests.forked import run_forked
from tests.integration.conftest import Crew, environment, wait_until
from workers import tiny
from workers.models.opener import weights_bytes


def complaint(crew: Crew, *arguments: str) -> str:
    """Standard error of a command that must succeed."""
    done = run_forked("farm", *arguments, env=environment(crew.settings))
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_size_that_no_worker_can_take_waits_with_the_reason_until_one_can(farm: Farm, crew: Crew) -> None:
    crew.worker("small", "tiny=null:?most_pixels=8192")
    crew.dispatcher()
    first = farm.submit(["x"], width=128, height=128, num_inference_steps=2)
    wait_until(lambda: bool(farm.too_large(first.id)), "its worker has found out")
    batch = farm.submit(["a", "b"], width=256, height=256, num_inference_steps=2)
    others = farm.submit(["c"], width=64, height=64, num_inference_steps=2)
    assert others.wait(30).counts[JobState.SUCCEEDED] == 1
    assert batch.status().counts[JobState.PENDING] == 2
    for arguments in (["status", batch.id], ["submit", "d", "--width", "256", "--height", "256", "--steps", "1"]):
        said = complaint(crew, *arguments)
        assert "no worker has the memory for tiny beyond 16,383 pixels now" in said
    assert [job.info.attempt for job in batch] == [0, 0]
    crew.worker("large", "tiny=null:")
    for each in (batch, first):
        assert each.wait(60).counts[JobState.SUCCEEDED] == each.total
    assert farm.too_large() == {}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.long
def test_a_size_beyond_the_memory_is_told_at_the_first_submit_and_never_tried_there(
    farm: Farm, crew: Crew, tmp_path: Path
) -> None:
    with closing(Storage(crew.settings)) as storage:
        ModelStore(storage).push(tiny.WEIGHTS, "small", "ann")
    cache = tmp_path / "cache"
    # Weights are stored in half precision and take twice as much in memory. With one model loaded, the budget has no
    # room for the other, not even at its stored size.
    budget = 5 * weights_bytes(str(tiny.WEIGHTS)) // 2
    crew.worker(
        *("small", "tiny=tiny,other=farm:small"),
        data_kib=3 * 2**20,
        FARM_MEMORY_BUDGET=budget,
        FARM_MODEL_CACHE=cache,
    )
    crew.dispatcher()
    assert [worker.held for worker in farm.workers()] == [("tiny",)]
    assert not list(cache.rglob("*.safetensors"))
    large = ["--width", "4096", "--height", "4096", "--steps", "2"]
    batches = []
    for model in ("tiny", "other"):
        said = complaint(crew, "submit", "a", "--model", model, *large)
        # A forward of the small model takes 192 bytes per pixel and row, and its weights 29 MB.
        assert f"no worker has the memory for {model} beyond 17,334,271 pixels (8,667,135 with guidance) now" in said
        batches.append(farm.batch(farm.batches()[0].id))

    # Once the other model is loaded, the hash of its weights is known and its pictures can be reused.
    def spec(model: str) -> RenderSpec:
        return RenderSpec(prompt="c", model=model, width=64, height=64, num_inference_steps=2, seed=1)

    both = farm.submit([spec("tiny"), spec("other")])
    assert both.wait(60).counts[JobState.SUCCEEDED] == 2
    made = farm.job(f"{both.id}-2").info
    assert made.picture is not None
    weights = made.picture.model_sha256
    wait_until(lambda: said_of(farm, "other").sha256 == weights, "the worker has reported the hash of its weights")
    again = farm.submit(spec("other"))
    assert again.wait(60).counts[JobState.SUCCEEDED] == 1
    assert [job.info.reused_from for job in again] == [made.id]

    assert [job.info.attempt for batch in batches for job in batch] == [0, 0]
    crew.worker("large", "tiny=null:,other=null:")
    assert "memory" not in complaint(crew, "submit", "b", *large)
    batches.append(farm.batch(farm.batches()[0].id))
    for each in batches:
        assert each.wait(60).counts[JobState.SUCCEEDED] == 1
        assert [job.info.tries for job in each] == [0]


def said_of(farm: Farm, model: str) -> ServedModel:
    """The only worker's description of a model."""
    (worker,) = farm.workers()
    return next(one for one in worker.models if one.name == model)

"""Renders in progress: checkpoints, drains, previews, trajectories."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from farm.client.farm import Farm
from farm.client.job import Job
from farm.jobs.states import JobState
from farm.objects.storage import Storage
from farm.specs.object_keys import manifest_key
from farm.specs.spec import RenderSpec
from tests.checkpoints import build_checkpoint
from tests.integration.conftest import Crew, Process, wait_until
from workers.engine.engine import Engine
from workers.models.pins import Pins
from workers.pipelines import load
from workers.pipelines.null import colour
from workers.render.request import RenderRequest

pytestmark = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)

SLOW = "tiny=null:?seconds_per_step=0.1"


def keys(farm: Farm, batch_id: str) -> list[str]:
    """Keys of a batch in the bucket, without its manifest."""
    storage = Storage(farm.settings)
    found = [key for key in storage.keys(f"{batch_id}/") if key != manifest_key(batch_id)]
    storage.close()
    return found


def checkpointed(worker: Process, job: Job) -> None:
    """Wait until a checkpoint of a job is written and recorded in SQL."""
    wait_until(lambda: f"checkpointed job_id={job.id} " in worker.log.read_text(), "a checkpoint is written")


def resumed(worker: Process) -> int:
    """The step from which a worker last resumed a job; 0 if it resumed none."""
    said = [line for line in worker.log.read_text().splitlines() if "resuming job_id" in line]
    return int(said[-1].rpartition("step=")[2].split()[0]) if said else 0


def rgb(seed: int) -> tuple[int, ...]:
    """The colour of the null pipeline's picture."""
    return tuple(colour(seed).mul(255).round().int().flatten().tolist())


def test_a_job_of_a_killed_worker_goes_on_where_it_was_checkpointed(farm: Farm, crew: Crew) -> None:
    crew.dispatcher()
    first = crew.worker("w1", SLOW, FARM_CHECKPOINT_STEPS=5)
    batch = farm.submit(RenderSpec(prompt="long", seed=7, num_inference_steps=60), name="long")
    job = next(iter(batch))
    checkpointed(first, job)
    first.kill()
    second = crew.worker("w2", SLOW, FARM_CHECKPOINT_STEPS=5)
    job.wait(90)
    assert (job.state, job.info.attempt, job.info.tries) == (JobState.SUCCEEDED, 2, 0)
    assert resumed(second) >= 5
    assert job.image().getcolors() == [(64 * 64, rgb(7))]
    wait_until(lambda: keys(farm, batch.id) == [job.picture.key], "nothing but the picture is left")


def test_the_time_since_the_last_checkpoint_counts_too(farm: Farm, crew: Crew) -> None:
    worker = crew.worker("w1", SLOW, FARM_CHECKPOINT_SECONDS=1)
    batch = farm.submit("long", num_inference_steps=40)
    job = next(iter(batch))
    checkpointed(worker, job)
    assert job.wait(90).state is JobState.SUCCEEDED
    wait_until(lambda: keys(farm, batch.id) == [job.picture.key], "nothing but the picture is left")


def test_a_draining_worker_finishes_what_it_can_and_another_goes_on_with_the_rest(farm: Farm, crew: Crew) -> None:
    crew.dispatcher()
    first = crew.worker("w1", SLOW, FARM_DRAIN_SECONDS=15)
    batch = farm.submit(
        [RenderSpec(prompt="short", num_inference_steps=25), RenderSpec(prompt="long", num_inference_steps=400)]
    )
    short, long = batch
    wait_until(lambda: min(job.refresh().info.steps_done for job in (short, long)) >= 8, "both are under way")
    assert first.stop(15 + 20) == 0
    assert short.refresh().state is JobState.SUCCEEDED
    assert (long.refresh().state, long.info.tries) != (JobState.FAILED, 1)
    second = crew.worker("w2", SLOW, FARM_DRAIN_SECONDS=4)
    wait_until(lambda: resumed(second) >= 8, "the other goes on where it stopped")
    assert long.refresh().info.attempt == 2


@pytest.mark.long
def test_a_resumed_picture_of_a_real_model_is_the_uninterrupted_one(farm: Farm, crew: Crew, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "random")
    spec = RenderSpec(
        prompt="a red circle", seed=3, num_inference_steps=500, guidance_scale=3, scheduler="euler_a", model="random"
    )
    crew.dispatcher()
    first = crew.worker("w1", f"random={folder}", FARM_CHECKPOINT_STEPS=20, FARM_DETERMINISTIC="true")
    job = next(iter(farm.submit(spec)))
    checkpointed(first, job)
    first.kill()
    second = crew.worker("w2", f"random={folder}", FARM_DETERMINISTIC="true")
    resumed_image = job.image()
    assert resumed(second) >= 20
    torch.set_num_threads(1)
    pipeline = load(str(folder), torch.device("cpu"), torch.float32)
    engine = Engine(Pins.of({"random": pipeline}), deterministic=True)
    engine.start()
    uninterrupted = engine.submit(RenderRequest("whole", spec)).result(60).image
    engine.stop()
    assert resumed_image.tobytes() == uninterrupted.tobytes()


def test_whoever_watches_sees_a_picture_come_into_being(farm: Farm, crew: Crew) -> None:
    crew.worker("w1", SLOW, FARM_PREVIEW_STEPS=3)
    batch = farm.submit(RenderSpec(prompt="slow", seed=5, num_inference_steps=50))
    job = next(iter(batch))
    seen = list(job.previews(timeout=60))
    steps = [preview.step for preview in seen]
    assert len(seen) >= 4
    assert steps == sorted(set(steps))
    assert all(preview.steps == 50 for preview in seen)
    assert seen[0].image.getpixel((0, 0)) < seen[-1].image.getpixel((0, 0)) <= rgb(5)
    assert job.refresh().state is JobState.SUCCEEDED
    wait_until(lambda: keys(farm, batch.id) == [job.picture.key], "nothing but the picture is left")


def test_a_trajectory_lies_beside_the_picture(farm: Farm, crew: Crew, tmp_path: Path) -> None:
    crew.worker("w1", "tiny=null:")
    batch = farm.submit(RenderSpec(prompt="film", seed=5, num_inference_steps=6, trajectory=True))
    batch.wait(60)
    job = next(iter(batch))
    frames = job.trajectory()
    assert len(frames) == 6
    assert frames[-1].tobytes() == job.image().tobytes()
    assert frames[0].getpixel((0, 0)) < frames[3].getpixel((0, 0)) < frames[-1].getpixel((0, 0))
    assert job.film_strip().size == (6 * 64, 64)
    batch.download(tmp_path / "out")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".png", ".webp"}
    with Image.open(next((tmp_path / "out").glob("*.webp"))) as animation:
        assert animation.n_frames == 6


def test_a_model_that_can_not_be_loaded_fails_its_jobs_and_not_the_worker(farm: Farm, crew: Crew) -> None:
    worker = crew.worker("w1", "tiny=null:,broken=/no/such/folder")
    broken, good = farm.submit("x", model="broken"), farm.submit("x", model="tiny")
    assert broken.wait(60).counts[JobState.FAILED] == 1
    assert "no folder '/no/such/folder'" in next(iter(broken)).error
    assert good.wait(60).counts[JobState.SUCCEEDED] == 1
    assert worker.popen.poll() is None

"""Previews and trajectories through the client; the test acts as the worker."""

import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from farm import Farm, InvalidInput, Job, JobNotSucceeded, NotFound, Settings
from farm.errors import ErrorClass
from farm.jobs.database import Database
from farm.jobs.records import Artifact, Claim, Pace, Picture, Role, WorkerInfo
from farm.jobs.served_models import ServedModel
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.specs.object_keys import image_key, preview_key, trajectory_keys
from tests.integration.conftest import wait_until

COLOURS = [(40 * step, 10, 200 - 40 * step) for step in range(5)]


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """SQLite only: other tests cover these queries on both databases."""
    return sqlite_url


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Settings with leases longer than a slow command."""
    return settings.model_copy(update={"lease_seconds": 600.0})


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    database = Database(sqlite_url)
    yield database
    database.close()


@dataclass
class Stand:
    """The store and storage calls of a worker, for the test to make."""

    store: JobStore
    storage: Storage

    def claim(self, job: Job) -> Claim:
        claim = self.store.leases.claim(job.id, "w1@host")
        assert claim is not None
        return claim

    def beat(self, claim: Claim, pace: Pace) -> dict[str, bool]:
        return dict(self.store.leases.beat("w1@host", {(claim.job_id, claim.attempt): pace}).previews)

    def show(self, claim: Claim, step: int, colour: tuple[int, int, int] = COLOURS[0]) -> None:
        text = PngInfo()
        text.add_text("step", str(step))
        text.add_text("steps", str(claim.spec.num_inference_steps))
        out = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(out, "PNG", pnginfo=text)
        self.storage.put(preview_key(claim.batch_id, claim.index, claim.attempt), out.getvalue(), "image/png")

    def finish(self, claim: Claim, colours: list[tuple[int, int, int]] = COLOURS) -> None:
        frames = [Image.new("RGB", (64, 64), colour) for colour in colours]
        key = image_key(claim.batch_id, claim.index, claim.attempt, claim.spec.prompt)
        data = encoded(frames[-1], "PNG")
        beside: list[tuple[Artifact, bytes]] = []
        if claim.spec.trajectory:
            strip, animation = trajectory_keys(key)
            page = Image.new("RGB", (64 * len(frames), 64))
            for place, frame in enumerate(frames):
                page.paste(frame, (64 * place, 0))
            film = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True, duration=100)
            beside = [
                (Artifact(Role.FILM_STRIP, strip, "image/png"), encoded(page, "PNG")),
                (Artifact(Role.ANIMATION, animation, "image/webp"), film),
            ]
        for artifact, content in beside:
            self.storage.put(artifact.key, content)
        self.storage.put(key, data)
        digest = hashlib.sha256(data).hexdigest()
        picture = Picture(key, digest, len(data), 64, 64, "e" * 64, 1.0)
        assert self.store.attempts.succeed(claim, picture, [artifact for artifact, _ in beside])


def encoded(image: Image.Image, kind: str, **how: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def colour(image: Image.Image) -> object:
    return image.getpixel((0, 0))


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture
def farm(settings: Settings) -> Iterator[Farm]:
    with Farm(settings) as farm:
        yield farm


@pytest.fixture
def worker(settings: Settings, database: Database) -> Iterator[Stand]:
    storage = Storage(settings)
    yield Stand(JobStore.over(database, settings), storage)
    storage.close()


@pytest.fixture
def job(farm: Farm) -> Job:
    return next(iter(farm.submit(["a cat"], num_inference_steps=5, trajectory=True)))


@pytest.fixture
def beside() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Runs a function in a thread that is joined at the end of the test."""
    threads: list[threading.Thread] = []

    def run(what: Callable[[], None]) -> None:
        threads.append(threading.Thread(target=what))
        threads[-1].start()

    yield run
    for thread in threads:
        thread.join()


def test_a_trajectory_has_a_picture_a_step_first_to_last(job: Job, worker: Stand) -> None:
    worker.finish(worker.claim(job))
    assert [colour(frame) for frame in job.trajectory()] == COLOURS
    assert colour(job.image()) == COLOURS[-1]
    assert job.film_strip().size == (64 * 5, 64)


@pytest.mark.parametrize("places", [(0, 1, 1, 1, 2), (3, 3, 3, 3, 3), (0, 0, 1, 1, 1)])
def test_steps_that_look_alike_are_each_in_the_trajectory(job: Job, worker: Stand, places: tuple[int, ...]) -> None:
    colours = [COLOURS[place] for place in places]
    worker.finish(worker.claim(job), colours)
    assert [colour(frame) for frame in job.trajectory()] == colours


def test_a_job_that_was_not_asked_for_its_trajectory_says_so_at_once(farm: Farm) -> None:
    job = next(iter(farm.submit(["a cat"])))
    for ask in (job.trajectory, job.film_strip):
        with pytest.raises(NotFound, match=f"{job.id} kept no trajectory.*trajectory=True"):
            ask()


def test_a_job_that_failed_has_no_trajectory(job: Job, worker: Stand) -> None:
    worker.store.attempts.fail(worker.claim(job), "bad spec", ErrorClass.BAD_INPUT)
    for ask in (job.trajectory, job.film_strip, job.preview):
        with pytest.raises(JobNotSucceeded, match="bad spec"):
            ask()


def test_a_download_brings_the_film_of_jobs_that_have_one(farm: Farm, worker: Stand, tmp_path: Path) -> None:
    batch = farm.submit([{"prompt": "with", "trajectory": True}, "without"], num_inference_steps=5)
    for job in batch:
        worker.finish(worker.claim(job))
    paths = batch.download(tmp_path / "out")
    assert [path.name for path in paths] == ["00001-with.a1.png", "00002-without.a1.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00001-with.a1.png",
        "00001-with.a1.trajectory.png",
        "00001-with.a1.trajectory.webp",
        "00002-without.a1.png",
    ]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert batch.download(tmp_path / "out") == paths
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_preview_is_asked_for_and_says_how_far_it_is(job: Job, worker: Stand, beside) -> None:
    claim = worker.claim(job)

    def show() -> None:
        wait_until(lambda: worker.beat(claim, Pace(2, 0.1)) == {job.id: False}, "a preview is requested")
        worker.show(claim, 2, COLOURS[2])

    beside(show)
    shown = job.preview(timeout=30)
    assert (shown.step, shown.steps, colour(shown.image)) == (2, 5, COLOURS[2])


def test_previews_come_one_by_one_until_the_job_ends(job: Job, worker: Stand) -> None:
    claim = worker.claim(job)
    seen = []
    worker.show(claim, 1)
    for shown in job.previews(vae=True, timeout=60):
        assert worker.beat(claim, Pace(shown.step, 0.1)) == {job.id: True}
        seen.append(shown.step)
        if shown.step < 3:
            worker.show(claim, shown.step + 1)
        else:
            worker.finish(claim)
    assert seen == [1, 2, 3]


def test_previews_of_a_job_that_waits_begin_when_it_does_and_go_on_with_its_next_attempt(
    job: Job, worker: Stand, beside
) -> None:
    beside(lambda: worker.show(worker.claim(job), 4))
    shown = job.previews(timeout=60)
    assert next(shown).step == 4
    info = job.refresh().info
    first = Claim(job.id, info.attempt, job.spec, info.batch_id, "", info.index, 1, 50, None)
    worker.store.attempts.hand_back(first)
    worker.store.backlog.enqueue(10)
    second = worker.claim(job)
    worker.show(second, 2)
    assert next(shown).step == 2


def test_an_old_preview_from_an_earlier_watcher_is_not_taken_for_new(farm: Farm, worker: Stand) -> None:
    job = next(iter(farm.submit(["a cat"], num_inference_steps=100)))
    claim = worker.claim(job)
    worker.show(claim, 5)
    worker.beat(claim, Pace(60, 0.1))
    with pytest.raises(TimeoutError, match="it goes on"):
        job.preview(timeout=0.3)
    worker.show(claim, 60)
    assert job.preview(timeout=30).step == 60


def test_a_preview_of_a_job_that_has_succeeded_is_its_picture(job: Job, worker: Stand) -> None:
    worker.finish(worker.claim(job))
    shown = job.preview()
    assert (shown.step, shown.steps, shown.image.size) == (5, 5, (64, 64))
    assert list(job.previews()) == []


def test_a_job_says_how_long_it_still_takes(job: Job, worker: Stand) -> None:
    claim = worker.claim(job)
    assert job.refresh().eta_seconds is None
    worker.beat(claim, Pace(3, 1.5))
    assert job.refresh().eta_seconds == 3.0


def test_the_command_line_submits_all_that_a_spec_may_say(farm: Farm, worker: Stand, command) -> None:
    worker.store.workers.register(
        WorkerInfo("w1@host", "cpu", "float32", 8, "0", (ServedModel("tiny"),))
    )  # without a hash: the model is not loaded yet
    options = ["--guidance-rescale", "0.7", "--clip-skip", "2", "--eta", "0.5", "--true-cfg-scale", "4"]
    done = command("submit", "a cat", "--name", "all", *options, "--deterministic", "--trajectory")
    assert (done.returncode, done.stderr) == (0, "")
    (said,) = (job.spec for job in farm.batch("all"))
    assert (said.guidance_rescale, said.clip_skip, said.eta, said.true_cfg_scale) == (0.7, 2, 0.5, 4.0)
    assert (said.deterministic, said.trajectory) == (True, True)
    assert json.loads(command("models", "--json").stdout)["tiny"] == {
        "sha256": None,
        "workers": ["w1@host"],
        "waiting": 1,
    }


def test_the_command_line_shows_pace_and_preview(job: Job, worker: Stand, command, tmp_path: Path) -> None:
    claim = worker.claim(job)
    worker.beat(claim, Pace(3, 1.5))
    worker.show(claim, 3)
    said = command("status", job.id).stdout
    assert all(words in said for words in ("3/5", "1.5 s", "3 s"))
    assert json.loads(command("status", job.id, "--json").stdout)["eta_seconds"] == 3.0
    done = command("preview", job.id, "--vae", "--out", "p.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 3 of 5 in p.png" in done.stdout
    assert size(tmp_path / "p.png") == (8, 8)
    assert worker.beat(claim, Pace(3, 1.5)) == {job.id: True}
    worker.finish(claim)
    assert "step 5 of 5" in command("preview", job.id, "--follow").stdout
    assert size(tmp_path / f"{job.id}.preview.png") == (64, 64)
    unknown = command("preview", "nobody-1")
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)


def test_a_sampler_that_its_model_can_not_use_is_refused_with_the_row(farm: Farm, worker: Stand) -> None:
    model = ServedModel("sd3", sha256="e" * 64, family="StableDiffusion3Pipeline", samplers="flow")
    rows = [{"prompt": "fine", "scheduler": "euler"}, {"prompt": "not", "scheduler": "ddim"}]
    assert len(farm.submit(rows, model="sd3")) == 2  # accepted: no worker serves sd3 yet, so its samplers are unknown
    worker.store.workers.register(WorkerInfo("w1@host", "cpu", "float32", 8, "0", (model,)))
    with pytest.raises(InvalidInput, match="spec 2: scheduler: ddim can't sample sd3") as caught:
        farm.submit(rows, model="sd3")
    assert len(caught.value.problems) == 1
    assert len(farm.batches()) == 1

"""Pausing, resuming, cancelling, retrying and showing jobs, with real workers and the command line."""

import json

import pytest

from farm.client.farm import Farm
from farm.client.job import Job
from farm.jobs.states import JobState
from farm.specs.spec import RenderSpec
from tests.forked import run_forked
from tests.integration.conftest import Crew, environment, wait_until
from tests.integration.test_halfway import keys, resumed, rgb

pytestmark = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)

SLOW = "tiny=null:?seconds_per_step=0.05"


def farm_says(crew: Crew, *arguments: str) -> str:
    """Run `farm ARGUMENTS…`, which must succeed; returns its output."""
    ran = run_forked("farm", *arguments, env=environment(crew.settings, COLUMNS=200))
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def under_way(job: Job, steps: int) -> None:
    wait_until(lambda: job.refresh().info.steps_done >= steps, f"{steps} steps are done")


def test_a_paused_batch_frees_the_slots_and_goes_on_from_where_it_was(farm: Farm, crew: Crew) -> None:
    crew.dispatcher()
    worker = crew.worker("w1", SLOW, slots=1)
    long = farm.submit(RenderSpec(prompt="long", seed=7, num_inference_steps=200), name="long")
    job = next(iter(long))
    under_way(job, 10)
    assert farm_says(crew, "pause", "long") == "1 job paused\n"
    wait_until(lambda: job.refresh().state is JobState.PENDING, "it is handed back", seconds=10)
    assert farm.submit("short", num_inference_steps=2).wait(30).counts[JobState.SUCCEEDED] == 1
    assert job.refresh().state is JobState.PENDING
    assert farm_says(crew, "resume", "long") == "1 job resumed\n"
    assert job.wait(60).state is JobState.SUCCEEDED
    assert resumed(worker) >= 10
    assert job.image().getcolors() == [(64 * 64, rgb(7))]  # the colour depends on the number of steps done
    told = job.attempts()
    assert [(one.attempt, one.outcome, one.reason) for one in told] == [
        (1, "handed_back", "paused"),
        (2, "succeeded", None),
    ]
    assert told[0].steps_done >= 10
    wait_until(lambda: keys(farm, long.id) == [job.picture.key], "nothing but the picture is left")


def test_a_cancelled_render_is_out_of_the_engine_when_it_is_said_to_be(farm: Farm, crew: Crew) -> None:
    crew.dispatcher()
    crew.worker("w1", "tiny=null:?seconds_per_step=1", slots=1)
    job = next(iter(farm.submit("slow", num_inference_steps=100)))
    under_way(job, 1)
    assert farm_says(crew, "cancel", job.id) == "1 job cancelled\n"
    assert job.wait(10).state is JobState.CANCELLED
    assert [one.outcome for one in job.attempts()] == ["cancelled"]


def test_a_failed_job_tells_its_story_and_is_tried_anew(farm: Farm, crew: Crew) -> None:
    crew.dispatcher()
    worker = crew.worker("w1", "tiny=null:,broken=/no/such/folder")
    job = next(iter(farm.submit("x", model="broken")))
    assert job.wait(60).state is JobState.FAILED
    shown = farm_says(crew, "show", job.id)
    for told in (job.id, "failed", "no folder '/no/such/folder'", "[bad_input]", worker.name, "model"):
        assert told in shown
    assert farm_says(crew, "retry", job.id) == "1 job will be retried\n"
    wait_until(lambda: len(job.attempts()) == 2, "it is tried anew")
    told = json.loads(farm_says(crew, "show", job.id, "--json"))
    assert [one["outcome"] for one in told["attempts"]] == ["failed", "failed"]
    assert farm_says(crew, "cancel", "--owner", "nobody") == "nothing to cancel: all have ended\n"

"""More models than fit into a worker's memory budget: all jobs are rendered, with few reloads."""

import re
from collections import Counter
from pathlib import Path

import pytest

from farm.client.farm import Farm
from farm.jobs.states import JobState
from tests.checkpoints import build_checkpoint
from tests.integration.conftest import Crew
from workers.models.opener import weights_bytes

MODELS = ("a", "b", "c")
JOBS_EACH = 20


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One kind of database is enough here."""
    return sqlite_url


@pytest.mark.long
def test_jobs_of_models_that_do_not_fit_together_are_rendered_with_few_reloads(
    farm: Farm, crew: Crew, tmp_path: Path
) -> None:
    checkpoint = build_checkpoint(tmp_path / "checkpoint")
    listed = ",".join(f"{model}={checkpoint}" for model in MODELS)
    # The budget is 1.5 times the weights, so only one model fits.
    crew.dispatcher()
    worker = crew.worker("w1", listed, slots=4, FARM_MEMORY_BUDGET=weights_bytes(str(checkpoint)) * 3 // 2)
    mixed = [{"prompt": f"{model} {n}", "model": model} for n in range(JOBS_EACH) for model in MODELS]
    batch = farm.submit(mixed, num_inference_steps=2, width=64, height=64)
    assert batch.wait(60).counts[JobState.SUCCEEDED] == batch.total

    said = worker.log.read_text()
    pinned = re.findall(r" pinned model=(\w+) ", said)
    unpinned = re.findall(r" unpinned model=(\w+) ", said)
    assert pinned[0] == "a"
    assert set(pinned) == set(MODELS)
    # One at a time: each model was unpinned before the next was pinned.
    assert unpinned == pinned[:-1]
    assert Counter(job.info.attempt for job in batch) == {1: batch.total}
    assert len(unpinned) <= batch.total // 6

"""Sample batches, jobs and a worker for the views."""

from datetime import UTC, datetime, timedelta

from farm.jobs.records import BatchStatus, JobInfo, WorkerInfo
from farm.jobs.served_models import DeviceMemory, ServedModel
from farm.jobs.states import JobState
from farm.specs.spec import RenderSpec

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def status(name: str = "sea", **counts: int) -> BatchStatus:
    found = {state: counts.get(state.value, 0) for state in JobState}
    return BatchStatus(f"{name}-abcd1234", name, "anna", 50, sum(found.values()), NOW, found)


def failure(index: int = 7, batch: str = "sea-abcd1234", error: str = "NaN in the latents") -> JobInfo:
    values = dict.fromkeys(("worker", "seconds_per_step", "queued_at", "started_at", "picture"))
    return JobInfo(
        id=f"{batch}-{index}", batch_id=batch, index=index, spec=RenderSpec(prompt="a"), state=JobState.FAILED,
        attempt=1, tries=1, steps_done=3, error=error, finished_at=NOW + timedelta(seconds=index), **values,  # type: ignore[arg-type]
    )  # fmt: skip


WORKER = WorkerInfo(
    name="gpu-1@node", device="cuda:0", dtype="bfloat16", slots=16, version="1",
    models=(ServedModel("sd15", loaded=True), ServedModel("flux")), memory=DeviceMemory(20 * 2**30, 80 * 2**30),
)  # fmt: skip

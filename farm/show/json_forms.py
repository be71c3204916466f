"""Batches, jobs, attempts, dry runs and stored models as `--json` prints them: an interface for other programs."""

from typing import Any

from farm.jobs.estimates import DryRun
from farm.jobs.records import AttemptInfo, BatchStatus, JobInfo
from farm.objects.model_files import Manifest


def batch_json(batch: BatchStatus) -> dict[str, Any]:
    """A batch and its progress."""
    return {
        "batch": batch.id,
        "name": batch.name,
        "owner": batch.owner,
        "priority": batch.priority,
        "total": batch.total,
        "done": batch.done,
        "paused": batch.paused,
        "counts": {state.value: count for state, count in batch.counts.items()},
        "created_at": batch.created_at,
        "finished_at": batch.finished_at,
    }


def job_json(job: JobInfo) -> dict[str, Any]:
    """A job, its spec and its picture."""
    return {
        "job": job.id,
        "index": job.index,
        "state": job.state.value,
        "attempt": job.attempt,
        "tries": job.tries,
        "worker": job.worker,
        "steps_done": job.steps_done,
        "seconds_per_step": job.seconds_per_step,
        "eta_seconds": job.eta_seconds,
        "error": job.error,
        "paused": job.paused,
        "not_before": job.not_before,
        "lost_leases": job.lost_leases,
        "reused_from": job.reused_from,
        "spec": job.spec.model_dump(mode="json"),
        "picture": vars(job.picture) if job.picture else None,
        "artifacts": [vars(artifact) for artifact in job.artifacts],
        "started_at": job.started_at,
        "finished_at": job.finished_at,
    }


def attempt_json(attempt: AttemptInfo) -> dict[str, Any]:
    """An attempt that has ended."""
    return {**vars(attempt), "seconds": attempt.seconds}


def dry_run_json(result: DryRun) -> dict[str, Any]:
    """The result of a dry run; each spec contains only the fields that were set."""
    return {**vars(result), "first": [spec.model_dump(mode="json", exclude_unset=True) for spec in result.first]}


def stored_model_json(manifest: Manifest) -> dict[str, Any]:
    """A model in the farm's object store."""
    fields = manifest.model_dump(mode="json", exclude={"files"})
    return {**fields, "bytes": manifest.bytes, "files": len(manifest.files)}

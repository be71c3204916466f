"""A client of any release, which a test controls through pipes: each line is a JSON request or its answer.

It uses only the public interface of `farm`, and runs unchanged on the previous release and on this one.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from farm import Farm, Job


class Client:
    """The available requests by name."""

    def __init__(self, farm: Farm) -> None:
        self._farm = farm

    def submit(self, specs: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        """Submit specs; returns the id of the batch and the ids of its jobs."""
        batch = self._farm.submit(specs, **options)
        return {"batch": batch.id, "jobs": [job.id for job in batch]}

    def status(self, batch: str) -> dict[str, Any]:
        """Return the status of a batch."""
        status = self._farm.batch(batch).status()
        counts = {state.value: count for state, count in status.counts.items() if count}
        return {"counts": counts, "done": status.done, "paused": status.paused, "total": status.total}

    def job(self, job: str) -> dict[str, Any]:
        """Return the facts that the release reports about a job, except its files."""
        return _reported(self._farm.job(job))

    def attempts(self, job: str) -> list[dict[str, Any]]:
        """Return the ended attempts of a job."""
        return [{**vars(one), "seconds": None} for one in self._farm.job(job).attempts()]

    def files(self, job: str) -> dict[str, Any]:
        """Return hashes and sizes of every file that a job's methods make from its picture and its trajectory."""
        found = self._farm.job(job).wait(60)
        png, image = found.png(), found.image()
        with tempfile.TemporaryDirectory() as folder:
            found.download(folder)
            downloaded = {path.name: _sha256(path.read_bytes()) for path in sorted(Path(folder).iterdir())}
        made: dict[str, Any] = {
            "png": _sha256(png),
            "image": [image.size, _sha256(image.tobytes())],
            "downloaded": downloaded,
            "url": found.url().partition("?")[0],
        }
        if found.spec.trajectory:
            frames = found.trajectory()
            made["frames"] = [_sha256(frame.tobytes()) for frame in frames]
            made["last frame is the picture"] = frames[-1].tobytes() == image.convert("RGB").tobytes()
            made["strip"] = found.film_strip().size
        return made

    def save(self, job: str, path: str) -> None:
        """Write a job's picture to a file."""
        self._farm.job(job).image().save(path)

    def batch(self, batch: str) -> dict[str, Any]:
        """Return the results of a batch's methods: its jobs, its manifest, an archive, a contact sheet."""
        found = self._farm.batch(batch)
        with tempfile.TemporaryDirectory() as folder:
            downloaded = sorted(path.name for path in found.download(folder))
            packed = found.archive(Path(folder) / "all.zip")
        return {
            "jobs": [_reported(job) for job in found],
            "manifest": list(found.manifest()),
            "downloaded": downloaded,
            "packed": packed,
            "sheet": _sha256(found.contact_sheet().tobytes()),
        }

    def preview(self, job: str) -> dict[str, Any]:
        """Return the step and size of a job's next preview."""
        shown = self._farm.job(job).preview(timeout=60)
        return {"step": shown.step, "size": shown.image.size}

    def steer(self, what: str, name: str, verb: str) -> Any:
        """Cancel, pause, resume, retry or delete a job, a batch or an owner; returns the method's own result."""
        one: Any = getattr(self._farm, what)(name)
        return getattr(one, verb)()

    def workers(self) -> dict[str, dict[str, Any]]:
        """Return the live workers by name."""
        return {
            one.name: {
                "version": one.version,
                "slots": one.slots,
                "models": len(one.models),
                "held": sorted(one.held),
                "has memory": one.memory is not None,
            }
            for one in self._farm.workers()
            if one.alive
        }


def _name(model: Any) -> str:
    return str(model["name"] if isinstance(model, dict) else model.name)  # a mapping in the previous release


def _reported(job: Job) -> dict[str, Any]:
    info = job.info
    return {
        "id": job.id,
        "index": job.index,
        "spec": job.spec.model_dump(mode="json", exclude_defaults=True),  # a later release may have further fields
        "state": job.state.value,
        "error": job.error,
        "attempt": info.attempt,
        "tries": info.tries,
        "worker": info.worker,
        "steps_done": info.steps_done,
        "paused": info.paused,
        "reused_from": info.reused_from,
        "picture": None if job.picture is None else vars(job.picture),
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    """Answer requests until standard input ends."""
    with Farm() as farm:
        client = Client(farm)
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                answer = {"result": getattr(client, asked["call"])(**asked["with"])}
            except Exception as error:  # noqa: BLE001 - the test reports it with the release that raised it
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer, default=str), flush=True)


if __name__ == "__main__":
    main()

"""The Python client of a render farm: submit prompts, follow them, download the pictures. It does not need torch.

from farm import Farm

with Farm() as farm:
    batch = farm.submit(["a red circle on a white background"], name="first")
    batch.wait(progress=True)
    batch.contact_sheet().save("sheet.png")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from farm.version import __version__ as __version__

if TYPE_CHECKING:
    from farm.client.batch import Batch
    from farm.client.farm import Farm
    from farm.client.job import Job
    from farm.client.owner import Owner
    from farm.client.previews import Preview
    from farm.errors import FarmError, InvalidInput, JobNotSucceeded, NotConfigured, NotFound, ServiceUnavailable
    from farm.jobs.records import AttemptInfo, BatchStatus
    from farm.jobs.states import JobState
    from farm.settings import Settings
    from farm.specs.spec import RenderSpec

_HOMES = {
    "AttemptInfo": "jobs.records",
    "Batch": "client.batch",
    "BatchStatus": "jobs.records",
    "Farm": "client.farm",
    "FarmError": "errors",
    "InvalidInput": "errors",
    "Job": "client.job",
    "JobNotSucceeded": "errors",
    "JobState": "jobs.states",
    "NotConfigured": "errors",
    "NotFound": "errors",
    "Owner": "client.owner",
    "Preview": "client.previews",
    "RenderSpec": "specs.spec",
    "ServiceUnavailable": "errors",
    "Settings": "settings",
}

__all__ = [
    "AttemptInfo",
    "Batch",
    "BatchStatus",
    "Farm",
    "FarmError",
    "InvalidInput",
    "Job",
    "JobNotSucceeded",
    "JobState",
    "NotConfigured",
    "NotFound",
    "Owner",
    "Preview",
    "RenderSpec",
    "ServiceUnavailable",
    "Settings",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: lower layers import this package, and the command line should start fast.
    if name in _HOMES:
        return getattr(import_module(f"farm.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'farm' has no attribute {name!r}")

"""The farm's client: hand prompts in, watch them, fetch the pictures. No torch in here.

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
    from farm.client import Farm
    from farm.errors import (
        FarmError,
        InvalidInput,
        JobNotSucceeded,
        NotConfigured,
        NotFound,
        ServiceUnavailable,
    )
    from farm.handles import Batch, Job, Owner
    from farm.previews import Preview
    from farm.records import AttemptInfo, BatchStatus
    from farm.settings import Settings
    from farm.spec import RenderSpec
    from farm.states import JobState

_HOMES = {
    "AttemptInfo": "records",
    "Batch": "handles",
    "BatchStatus": "records",
    "Farm": "client",
    "FarmError": "errors",
    "InvalidInput": "errors",
    "Job": "handles",
    "JobNotSucceeded": "errors",
    "JobState": "states",
    "NotConfigured": "errors",
    "NotFound": "errors",
    "Owner": "handles",
    "Preview": "previews",
    "RenderSpec": "spec",
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
    # On first use: the lower layers import this package, and the command line should answer at once.
    if name in _HOMES:
        return getattr(import_module(f"farm.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'farm' has no attribute {name!r}")

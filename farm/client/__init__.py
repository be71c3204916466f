"""The Python client: `Farm`, and the handles `Batch`, `Job` and `Owner`."""

from farm.client.batch import Batch
from farm.client.job import Job
from farm.client.owner import Owner

__all__ = ["Batch", "Job", "Owner"]

"""The Python client: `Farm`, and handles of what was submitted: `Batch`, `Job`, `Owner`."""

from farm.client.batch import Batch
from farm.client.job import Job
from farm.client.owner import Owner

__all__ = ["Batch", "Job", "Owner"]

"""Handles on what was handed in: `Batch`, `Job`, `Owner`, to watch, to steer, and to fetch what comes of them."""

from farm.client.batch import Batch
from farm.client.job import Job
from farm.client.owner import Owner

__all__ = ["Batch", "Job", "Owner"]

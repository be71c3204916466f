"""Handles on what was handed in: `Batch`, `Job`, `Owner`, to watch, to steer, and to fetch what comes of them."""

from farm.handles.batch import Batch
from farm.handles.job import Job
from farm.handles.owner import Owner

__all__ = ["Batch", "Job", "Owner"]

"""Publishes a worker's models, their largest pictures and the device's memory in SQL."""

import logging
import threading
from dataclasses import replace

from farm.errors import ServiceUnavailable
from farm.jobs.records import WorkerInfo
from farm.jobs.workers import Workers
from farm.specs.spec import RenderSpec
from workers.models.served import Served

log = logging.getLogger(__name__)


class PublishedModels:
    """The description of a worker in SQL, kept up to date. All methods may be called from any thread."""

    def __init__(self, workers: Workers, info: WorkerInfo, served: Served) -> None:
        """`info` describes the worker without its models. Publishes nothing yet."""
        self._workers, self._served = workers, served
        self._worker = info
        self._lock = threading.Lock()
        self._published: WorkerInfo | None = None

    @property
    def info(self) -> WorkerInfo:
        """The worker with its models, at the last refresh."""
        return replace(self._worker, models=self._served.models, memory=self._served.memory)

    def publish(self) -> None:
        """Update SQL if the loaded models or the device's memory have changed, or the last update failed."""
        self._served.refresh()
        try:
            self._update()
        except ServiceUnavailable as error:
            log.error("can't publish the models: %s", error)

    def allows(self, spec: RenderSpec) -> bool:
        """Whether the device may have enough memory for a picture of that size."""
        return self._served.allows(spec)

    def forbid(self, spec: RenderSpec) -> None:
        """Publish that the device lacks memory for a picture of that size, until this worker restarts."""
        self._served.forbid(spec)
        self._update()

    def _update(self) -> None:
        with self._lock:
            info = self.info
            if info != self._published:
                self._workers.describe(info)
                self._published = info

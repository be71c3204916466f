"""What the dispatcher does for batches that have ended: their manifests, and their deletion when they are too old."""

import logging
import threading

from farm.dispatch.deletion import Deletion
from farm.dispatch.manifests import Manifests
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.settings import Settings

log = logging.getLogger(__name__)

_BATCHES = 20
"""How many manifests a turn writes, and how many batches it deletes, at most."""


class Retention:
    """Writes manifests, and deletes what is given up, by a person or by its age; in turns that have an end."""

    def __init__(self, store: JobStore, storage: Storage, settings: Settings) -> None:
        self._store = store
        self._manifests = Manifests(store.endings, storage)
        self._deletion = Deletion(store.deletions, storage)
        self._days = settings.retention_days

    def turn(self, stop: threading.Event | None = None) -> bool:
        """Do what there is to be done, some of it; whether there is more. Between two batches it looks at `stop`.

        Raises `StorageUnavailable`, after which the next turn goes on where this one was.
        """
        stop = stop or threading.Event()
        ended = self._store.endings.unnoted(_BATCHES)
        noted = sum(self._manifests.write(batch_id) for batch_id in ended if not stop.is_set())
        if self._days:
            self._store.deletions.mark_older_than(self._days)
        given_up = self._store.deletions.marked(_BATCHES)
        moved = sum(self._went(batch_id) for batch_id in given_up if not stop.is_set())
        return noted == _BATCHES or moved > 0

    def _went(self, batch_id: str) -> bool:
        """Whether a batch is gone, or some of it: not if it waits for its workers."""
        if not self._store.deletions.at_rest(batch_id):
            return False
        self._deletion.go_on(batch_id)
        return True

"""The dispatcher's work for ended batches: their manifests, and the deletion of old ones."""

import logging
import threading

from farm.dispatch.deletion import Deletion
from farm.dispatch.manifests import Manifests
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.settings import Settings

log = logging.getLogger(__name__)

_BATCHES = 20
"""The maximum number of manifests that a turn writes, and of batches that it deletes."""


class Retention:
    """Writes manifests, and deletes batches that were marked by a user or by their age; in bounded turns."""

    def __init__(self, store: JobStore, storage: Storage, settings: Settings) -> None:
        self._store = store
        self._manifests = Manifests(store.endings, storage)
        self._deletion = Deletion(store.deletions, storage)
        self._days = settings.retention_days

    def turn(self, stop: threading.Event | None = None) -> bool:
        """Do a bounded part of the work; True if there is more. `stop` ends it after the current batch.

        Raises `StorageUnavailable`; the next turn continues.
        """
        stop = stop or threading.Event()
        ended = self._store.endings.unnoted(_BATCHES)
        noted = sum(self._manifests.write(batch_id) for batch_id in ended if not stop.is_set())
        if self._days:
            self._store.deletions.mark_older_than(self._days)
        given_up = self._store.deletions.marked(_BATCHES)
        moved = sum(self._delete_some(batch_id) for batch_id in given_up if not stop.is_set())
        return noted == _BATCHES or moved > 0

    def _delete_some(self, batch_id: str) -> bool:
        """Delete a part of a batch; False while some of its jobs are still running."""
        if not self._store.deletions.at_rest(batch_id):
            return False
        self._deletion.delete_some(batch_id)
        return True

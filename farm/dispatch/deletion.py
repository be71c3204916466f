"""Deletes batches: objects first and rows last, so that no object remains without a row."""

import time
from itertools import islice

from farm.jobs.deletions import Deletions
from farm.objects.large_objects import abort_uploads
from farm.objects.storage import Storage

_OBJECTS, _PIECES = 10_000, 20
_REST_SECONDS = 0.05
"""The pause between two deletions of rows, for other writers: SQLite allows one writer at a time."""


class Deletion:
    """Deletes batches that are marked for it. Several may run at once, and an interrupted one is repeated."""

    def __init__(self, deletions: Deletions, storage: Storage) -> None:
        self._deletions = deletions
        self._storage = storage

    def delete_some(self, batch_id: str) -> bool:
        """Delete some thousands of a batch's objects, or then of its rows; True when all are deleted.

        The batch must have no running jobs.

        Raises `StorageUnavailable`.
        """
        # With the slash, because a batch id may be a prefix of another.
        abort_uploads(self._storage, f"{batch_id}/")
        keys = list(islice(self._storage.keys(f"{batch_id}/"), _OBJECTS))
        self._storage.delete_many(keys)
        if len(keys) == _OBJECTS:
            return False
        after = 0
        for _ in range(_PIECES):
            following = self._deletions.delete_rows(batch_id, after)
            if following is None:
                return True
            after = following
            time.sleep(_REST_SECONDS)
        return False

    def delete(self, batch_id: str) -> bool:
        """Delete a batch; False if some of its jobs are still running.

        Their workers stop within a beat, or lose their leases; then the dispatcher deletes the batch. Pictures recorded
        before that are deleted with it, and none can be recorded afterwards. Raises `StorageUnavailable`.
        """
        while self._deletions.at_rest(batch_id):
            if self.delete_some(batch_id):
                return True
        return False

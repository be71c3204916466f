"""How a batch that is given up goes: its objects first, its rows last, so that nothing in the bucket is nobody's."""

import time
from itertools import islice

from farm.jobs.deletions import Deletions
from farm.objects.large_objects import abort
from farm.objects.storage import Storage

_OBJECTS, _PIECES = 10_000, 20
_REST_SECONDS = 0.05
"""How long others may write between two pieces of rows that go: SQLite has one writer."""


class Deletion:
    """Deletes batches that are given up. Any number may at once, and whoever is interrupted is only repeated."""

    def __init__(self, deletions: Deletions, storage: Storage) -> None:
        self._deletions = deletions
        self._storage = storage

    def go_on(self, batch_id: str) -> bool:
        """Delete some thousands of the objects, or else of the rows, of a batch at rest; whether nothing is left.

        Raises `StorageUnavailable`.
        """
        # With the slash: no batch's objects begin like those of another one.
        abort(self._storage, f"{batch_id}/")
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

    def carry_out(self, batch_id: str) -> bool:
        """Delete a batch to its end; False if jobs of it are still rendered.

        Their workers stop within a beat, or lose their leases: the dispatcher deletes it then. Who records a picture
        before that has put it where it is found, and nobody does after it. Raises `StorageUnavailable`.
        """
        while self._deletions.at_rest(batch_id):
            if self.go_on(batch_id):
                return True
        return False

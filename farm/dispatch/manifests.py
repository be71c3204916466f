"""The manifest of a batch: a JSON line with the result of each job, in the bucket beside its pictures."""

import json
import logging
from collections.abc import Iterator
from typing import Any

from farm.errors import NotFound
from farm.jobs.endings import Endings
from farm.objects.large_objects import abort_uploads
from farm.objects.storage import Storage
from farm.specs.object_keys import manifest_key

log = logging.getLogger(__name__)


class Manifests:
    """Writes and reads the manifests of ended batches; a batch that ends again after a retry gets a new one."""

    def __init__(self, endings: Endings, storage: Storage) -> None:
        self._endings = endings
        self._storage = storage

    def write(self, batch_id: str) -> bool:
        """Write the manifest of an ended batch, and record that; False if the batch has not ended, or is retried.

        Uses constant memory. The manifest is written before it is recorded, so the next call repairs a failure in
        between. Raises `StorageUnavailable`.
        """
        ended_at = self._endings.last_ended_at(batch_id)
        if ended_at is None:
            return False
        key = manifest_key(batch_id)
        abort_uploads(self._storage, key)  # parts of a dispatcher that died mid-write, absent from listings
        self._storage.put_stream(key, self.lines(batch_id), "application/jsonl")
        return self._endings.note(batch_id, ended_at)

    def lines(self, batch_id: str) -> Iterator[bytes]:
        """The lines of a manifest, from SQL."""
        for entry in self._endings.entries(batch_id):
            yield json.dumps(entry).encode() + b"\n"

    def read(self, batch_id: str) -> Iterator[dict[str, Any]]:
        """The result of each job of a batch, in order; from SQL until its manifest is written.

        Raises `StorageUnavailable`.
        """
        if self._endings.noted(batch_id):
            try:
                yield from map(json.loads, self._storage.lines(manifest_key(batch_id)))
            except NotFound:
                log.warning("the manifest of batch_id=%s is gone from the bucket", batch_id)
            else:
                return
        yield from self._endings.entries(batch_id)

"""Copies pictures for reuse, in separate threads, so that a hanging object store delays no job."""

import logging
import threading
import time
from collections.abc import Callable, Mapping

from farm.errors import NotFound, ServiceUnavailable
from farm.jobs.reuse import Copying, Reuse
from farm.objects.storage import Storage
from farm.runtime.backoff import Backoff

log = logging.getLogger(__name__)

_THREADS = 4
_CHUNK = 16
"""The number of copies begun and recorded in one transaction."""
_BACKOFF = Backoff(base_seconds=5.0, max_seconds=60.0)
"""The pause after an error."""
_LOOK_SECONDS = 0.5


class Copier:
    """Completes jobs with copies of existing pictures of the same work.

    A failed copy leaves its job in the backlog. While the object store is unavailable the copier is not `ready`, and
    the dispatcher queues such jobs for rendering.
    """

    def __init__(self, reuse: Reuse, storage: Storage, clock: Callable[[], float] = time.monotonic) -> None:
        self._reuse = reuse
        self._storage = storage
        self._clock = clock
        self._waiting: dict[str, str] = {}
        self._at_work: set[str] = set()
        self._changed = threading.Condition()
        self._errors = 0
        self._away_until = 0.0

    @property
    def ready(self) -> bool:
        """Whether the object store seems available: no recent copy failed."""
        return self._clock() >= self._away_until

    def offer(self, copies: Mapping[str, str]) -> None:
        """Replace the pending copies: a source job for each job, in serving order.

        The dispatcher calls this after each pass.
        """
        with self._changed:
            self._waiting = {job_id: source for job_id, source in copies.items() if job_id not in self._at_work}
            if self._waiting:
                self._changed.notify_all()

    def start(self, stop: threading.Event) -> None:
        """Start threads that copy until `stop` is set."""
        for number in range(1, _THREADS + 1):
            threading.Thread(target=self._copy_on, args=(stop,), name=f"copies-{number}", daemon=True).start()

    def copy(self, wanted: Mapping[str, str]) -> int:
        """Copy the picture of its source job to each job; returns the number of jobs that succeeded.

        A picture that is missing, or whose size differs from SQL, is withdrawn from reuse. Raises `StorageUnavailable`
        and `DatabaseUnavailable` after recording the copies made so far.
        """
        made: list[Copying] = []
        error: ServiceUnavailable | None = None
        for one in self._reuse.begin_copies(wanted):
            try:
                if self._copied(one):
                    made.append(one)
                else:
                    log.warning("the picture of job_id=%s is missing or changed: not reused", one.source_id)
                    self._reuse.withdraw(one.source_id)
            except ServiceUnavailable as raised:
                error = raised
                break
        late = self._reuse.record_copies(made) if made else []
        self._storage.delete_many(key for one in late for key in one.keys.values())
        if error is not None:
            raise error
        return len(made) - len(late)

    def _copied(self, one: Copying) -> bool:
        size: int | None = one.bytes
        try:
            for source, key in one.keys.items():
                if not self._storage.copy(source, key, size):
                    return False
                size = None
        except NotFound:
            return False
        return True

    def _copy_on(self, stop: threading.Event) -> None:
        while not stop.is_set():
            if not (some := self._take()):
                continue
            try:
                self.copy(some)
                self._errors = 0
            except ServiceUnavailable as error:
                self._pause(str(error))
            except Exception:  # the thread must survive: jobs wait for its copies
                log.exception("copying broke")
                self._pause("see above")
            finally:
                with self._changed:
                    self._at_work.difference_update(some)

    def _take(self) -> dict[str, str]:
        with self._changed:
            if not self._waiting or not self.ready:
                self._changed.wait(_LOOK_SECONDS)
            some = dict(list(self._waiting.items())[:_CHUNK]) if self.ready else {}
            for job_id in some:
                del self._waiting[job_id]
            self._at_work.update(some)
        return some

    def _pause(self, why: str) -> None:
        with self._changed:
            self._waiting.clear()
            if self.ready:  # only the first thread that notices
                self._errors += 1
                seconds = _BACKOFF.seconds(self._errors)
                self._away_until = self._clock() + seconds
                log.warning("can't copy pictures, renders them for %.0f s: %s", seconds, why)

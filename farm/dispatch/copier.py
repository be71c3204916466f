"""Who copies pictures: threads beside the dispatcher, so that an object store that hangs holds up no job."""

import logging
import threading
import time
from collections.abc import Mapping

from farm.errors import NotFound, ServiceUnavailable
from farm.jobs.reuse import Copying
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.runtime.backoff import Backoff

log = logging.getLogger(__name__)

_THREADS = 4
_CHUNK = 16
"""How many copies are begun, and recorded, in one transaction."""
_BACKOFF = Backoff(base_seconds=5.0, max_seconds=60.0)
"""Between an error and the next copies."""
_LOOK_SECONDS = 0.5


class Copier:
    """Gives jobs copies of pictures that others have.

    What goes wrong leaves a job as it was, in the backlog. While the store is away nothing is `ready`, and the
    dispatcher lets be rendered what could have been copied.
    """

    def __init__(self, store: JobStore, storage: Storage) -> None:
        self._store = store
        self._storage = storage
        self._line: dict[str, str] = {}
        self._at_work: set[str] = set()
        self._changed = threading.Condition()
        self._errors = 0
        self._away_until = 0.0

    @property
    def ready(self) -> bool:
        """Whether copies can be made, as far as is known."""
        return time.monotonic() >= self._away_until

    def offer(self, copies: Mapping[str, str]) -> None:
        """Say which jobs are to have a copy of whose picture, first come first; what was said before is void.

        The dispatcher does after each pass.
        """
        with self._changed:
            self._line = {job_id: source for job_id, source in copies.items() if job_id not in self._at_work}
            if self._line:
                self._changed.notify_all()

    def start(self, stop: threading.Event) -> None:
        """Copy what is offered, until `stop` is set."""
        for number in range(1, _THREADS + 1):
            threading.Thread(target=self._copy_on, args=(stop,), name=f"copies-{number}", daemon=True).start()

    def copy(self, wanted: Mapping[str, str]) -> int:
        """Copy for each of these jobs the picture of the job that it is mapped to; returns how many succeeded by that.

        A picture that is gone, or is not what SQL says, serves nobody from now on. Raises `StorageUnavailable` and
        `DatabaseUnavailable`, with all recorded that could be.
        """
        made: list[Copying] = []
        error: ServiceUnavailable | None = None
        for one in self._store.begin_copies(wanted):
            try:
                if self._copied(one):
                    made.append(one)
                else:
                    log.warning("the picture of job_id=%s is gone, or not its own: it serves no other", one.source_id)
                    self._store.withdraw(one.source_id)
            except ServiceUnavailable as raised:
                error = raised
                break
        late = self._store.end_copies(made) if made else []
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
            except Exception:  # a thread that ended would hold up for ever what waits for its copies
                log.exception("copying broke")
                self._pause("see above")
            finally:
                with self._changed:
                    self._at_work.difference_update(some)

    def _take(self) -> dict[str, str]:
        with self._changed:
            if not self._line or not self.ready:
                self._changed.wait(_LOOK_SECONDS)
            some = dict(list(self._line.items())[:_CHUNK]) if self.ready else {}
            for job_id in some:
                del self._line[job_id]
            self._at_work.update(some)
        return some

    def _pause(self, why: str) -> None:
        with self._changed:
            self._line.clear()
            if self.ready:  # the first of the threads to notice
                self._errors += 1
                seconds = _BACKOFF.seconds(self._errors)
                self._away_until = time.monotonic() + seconds
                log.warning("can't copy pictures, renders them for %.0f s: %s", seconds, why)

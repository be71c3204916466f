"""The Python client: `Farm`, to hand prompts in and to find what was handed in."""

import getpass
import logging
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from farm.broker import Broker
from farm.db import Database
from farm.dispatch import Dispatcher
from farm.errors import BrokerUnavailable, InvalidInput, Problem
from farm.handles import Batch, Job
from farm.held import held_kinds, sampler_problem
from farm.jobs import JobStore
from farm.records import BatchStatus, WorkerInfo
from farm.settings import Settings
from farm.sources import Row, specs
from farm.spec import RenderSpec
from farm.storage import Storage

log = logging.getLogger(__name__)


class Farm:
    """A farm to hand prompts to.

    `Farm()` finds its settings by itself: `FARM_*` in the environment, or the embedded farm that `farm up` started in
    this folder. Use it as a context manager, or `close` it. Safe to use from many threads.

    Raises `NotConfigured` when there is no farm to be found, `DatabaseUnavailable` when its database does not
    answer, `SchemaMismatch` when that is of another version.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings.load()
        self._db = Database(self.settings.database_url)
        self._db.check_schema()
        self._store = JobStore(self._db, self.settings)
        self._storage = Storage(self.settings)
        self._broker = Broker(self.settings)

    def check(self) -> None:
        """Raise the `ServiceUnavailable` of the first service that does not answer."""
        self._broker.ping()
        self._storage.ping()

    def submit(
        self,
        what: str | RenderSpec | Iterable[str | RenderSpec | Mapping[str, Any] | Row],
        *,
        name: str | None = None,
        priority: int = 50,
        owner: str | None = None,
        **defaults: Any,
    ) -> Batch:
        """Hand in prompts, specs, or mappings of a spec's fields; all of them are accepted, or none.

        Further keyword arguments are defaults for the fields that a prompt or mapping leaves out, such as
        `num_inference_steps=30, model="sd15"`; a whole `RenderSpec` stays as it is. `priority` is 0 to 100, the
        higher the sooner. When this returns, the jobs are safe in SQL, and the first of them in Redis, unless that
        is away: then they start when it is back, and a warning is logged.

        A sampler that the model of a spec can't use, as the workers hold that now, is refused; a model that none holds
        is not. Raises `InvalidInput` with everything that is wrong, and `DatabaseUnavailable`.
        """
        rows = [what] if isinstance(what, str | RenderSpec) else what
        kinds = held_kinds(self._store.workers())
        made = specs(rows, defaults, lambda spec, where: sampler_problem(spec, where, kinds))
        problems = []
        if not made:
            problems.append(Problem("", "", "there is nothing to render: no prompts"))
        if not 0 <= priority <= 100:
            problems.append(Problem("", "priority", f"should be 0 to 100, not {priority}"))
        name = (name or "").strip() or "batch"
        if len(name) > 200 or "\x00" in name:
            problems.append(Problem("", "name", "should be at most 200 characters, without NUL"))
        if problems:
            raise InvalidInput(problems)
        batch_id = self._store.submit(name, owner or self.settings.owner or getpass.getuser(), priority, made)
        try:
            Dispatcher(self._store, self._broker, self._storage, self.settings).fill()
        except BrokerUnavailable as error:
            log.warning("the jobs are safe in SQL and start when Redis is back: %s", error)
        return self.batch(batch_id)

    def batch(self, name_or_id: str) -> Batch:
        """A batch by its id, or the newest of that name; raises `NotFound`."""
        return Batch(self._store, self._storage, self.settings, self._store.batch(name_or_id))

    def batches(self, limit: int = 20) -> list[BatchStatus]:
        """How far the newest batches are, newest first."""
        return self._store.batches(limit)

    def job(self, job_id: str) -> Job:
        """A job by its id; raises `NotFound`."""
        return Job(self._store, self._storage, self.settings, self._store.job(job_id))

    def workers(self) -> list[WorkerInfo]:
        """The workers, what they render on, and the models they hold."""
        return self._store.workers()

    def waiting(self) -> dict[str, int]:
        """How many jobs of each model wait for a worker."""
        return self._store.waiting_by_model()

    def close(self) -> None:
        """Close every connection."""
        self._broker.close()
        self._storage.close()
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

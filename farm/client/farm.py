"""The Python client: `Farm`, to hand prompts in and to find what was handed in."""

import getpass
import logging
import os
from collections.abc import Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeGuard

from farm.client.batch import Batch
from farm.client.job import Job
from farm.client.owner import Owner
from farm.dispatch.fill import fill
from farm.errors import DatabaseUnavailable, InvalidInput, NotFound, Problem, ServiceUnavailable
from farm.jobs.database import Database
from farm.jobs.estimates import DryRun, dry_run, speeds
from farm.jobs.overview import Load
from farm.jobs.records import BatchStatus, JobInfo, WorkerInfo
from farm.jobs.sampler_check import held_kinds, sampler_problem
from farm.jobs.served_models import MemoryLimit
from farm.jobs.store import JobStore
from farm.jobs.submissions import seed_from
from farm.jobs.tempo import Tempo
from farm.objects.storage import Storage
from farm.queue.broker import Broker
from farm.settings import Settings
from farm.specs.sources import Expansion, Given, Grid, Problems, specs
from farm.specs.spec import RenderSpec, shown

log = logging.getLogger(__name__)

MAX_NAME_CHARS = 200
"""How long the name, the owner and the key of a batch may be."""
_NAMED = f"should be 1 to {MAX_NAME_CHARS} characters of valid Unicode, without NUL"


def _is_name(given: object) -> TypeGuard[str]:
    """Whether both databases can keep it: PostgreSQL has no NUL, and neither has lone surrogates."""
    if not isinstance(given, str) or len(given) > MAX_NAME_CHARS or "\x00" in given:
        return False
    try:
        given.encode()
    except UnicodeEncodeError:
        return False
    return True


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
        self._store = JobStore.over(self._db, self.settings)
        self._storage = Storage(self.settings)
        self._broker = Broker(self.settings)

    def check(self) -> None:
        """Raise the `ServiceUnavailable` of the first service that does not answer."""
        self._broker.ping()
        self._storage.ping()

    def submit(
        self,
        what: Given | Iterable[Given],
        *,
        name: str | None = None,
        priority: int = 50,
        owner: str | None = None,
        key: str | None = None,
        reuse: bool = True,
        grid: Grid | None = None,
        seeds: str | Iterable[int] | None = None,
        template: str | None = None,
        wildcards: bool | str | os.PathLike[str] = False,
        wildcard_seed: int | None = None,
        **defaults: Any,
    ) -> Batch:
        """Hand in prompts, specs, mappings of a spec's fields, or files of those (`Path`); all are accepted, or none.

        Further keyword arguments are defaults for the fields that a prompt or mapping leaves out, such as
        `num_inference_steps=30, model="sd15"`; a whole `RenderSpec` stays as it is. `priority` is 0 to 100, the
        higher the sooner. When this returns, the jobs are safe in SQL, and the first of them in Redis, unless that
        is away: then they start when it is back, and a warning is logged. Generators are read as they go, a row at a
        time.

        - `grid={"steps": [20, 30], "guidance": [5, 7.5]}` renders each row with each combination of these, and
          `seeds=range(10)` each of those with each seed, whatever the row says itself.
        - `template="a {animal} in {style}"` makes the prompt of the columns of a file, or of a mapping's names.
        - `wildcards=True` draws one of `{red|blue}` in prompts and a line of `wildcards/animal.txt` for `__animal__`;
          a folder here is where these files are. The same submission draws the same: from `wildcard_seed`, or else
          from the spec's own seed, if it has one.

        With a `key`, a name for this submission that you choose, it can be handed in again after an error of which it
        is not clear what it left: the same specs in the same order are the same batch then, and seeds nobody chose
        are drawn from the key and the place.

        A job of the same spec, with a seed that was chosen, as one that was rendered by a model of the same weights
        gets a copy of that picture, and of such jobs at once one is rendered. With `reuse=False` each is rendered.

        A sampler that the model of a spec can't use, as the workers hold that now, is refused; a model that none holds
        is not. Raises `InvalidInput` with everything that is wrong, `KeyUsed` if the key was used for other specs, and
        `DatabaseUnavailable`.
        """
        whose = owner or self.settings.owner or getpass.getuser()
        name, made = self._read(
            what,
            name=name,
            priority=priority,
            owner=whose,
            key=key,
            grid=grid,
            seeds=seeds,
            template=template,
            wildcards=wildcards,
            wildcard_seed=wildcard_seed,
            **defaults,
        )
        batch_id = self._store.submissions.submit(name, whose, priority, made, key=key, reuse=reuse)
        try:
            fill(self._store.backlog, self._store.workers, self._broker, self.settings.window)
        except ServiceUnavailable as error:
            log.warning("batch %s is safe in SQL and starts when what is away is back: %s", batch_id, error)
        try:
            return self.batch(batch_id)
        except DatabaseUnavailable as error:
            raise DatabaseUnavailable(f"batch {batch_id} is handed in, but {error}") from error

    def dry_run(self, what: Given | Iterable[Given], **options: Any) -> DryRun:
        """What `submit` would do with the same arguments: how many pictures, which first, how long; nothing is written.

        Raises what `submit` raises.
        """
        _, made = self._read(what, **options)
        return dry_run(made, speeds(self._db))

    def _read(
        self,
        what: Given | Iterable[Given],
        *,
        name: str | None = None,
        priority: int = 50,
        owner: str | None = None,
        key: str | None = None,
        reuse: bool = True,
        grid: Grid | None = None,
        seeds: str | Iterable[int] | None = None,
        template: str | None = None,
        wildcards: bool | str | os.PathLike[str] = False,
        wildcard_seed: int | None = None,
        **defaults: Any,
    ) -> tuple[str, Iterator[RenderSpec]]:
        """A batch's name and its specs, which raise `InvalidInput` at their end."""
        problems = Problems()
        if not isinstance(priority, int) or not 0 <= priority <= 100:
            problems.add(Problem("", "priority", f"should be 0 to 100, not {shown(priority)}"))
        for field, given in (("name", name), ("owner", owner), ("key", key)):
            if given is not None and not (_is_name(given) and (given or field != "key")):
                problems.add(Problem("", field, _NAMED))
        name = (name.strip() if _is_name(name) else "") or "batch"
        if _is_name(key) and wildcard_seed is None:
            wildcard_seed = seed_from(key, 0)
        expansion = Expansion.read(
            problems, grid=grid, seeds=seeds, template=template, wildcards=wildcards, wildcard_seed=wildcard_seed
        )
        if problems:
            raise problems.error()
        kinds = held_kinds(self._store.workers.all())
        return name, specs(what, defaults, partial(sampler_problem, kinds=kinds), expansion=expansion)

    def batch(self, name_or_id: str) -> Batch:
        """A batch by its id, or the newest of that name; raises `NotFound`."""
        if not _is_name(name_or_id):  # no database keeps it, and some refuse the question
            raise NotFound(f"there is no batch {shown(name_or_id)}; `farm status` lists them")
        return Batch(self._store, self._storage, self.settings, self._store.queries.batch(name_or_id))

    def batches(self, limit: int = 20) -> list[BatchStatus]:
        """How far the newest batches are, newest first."""
        return self._store.queries.batches(limit)

    def moving(self, limit: int = 20) -> list[BatchStatus]:
        """How far the batches are that have jobs on their way, in Redis or in a worker."""
        return [*self._store.overview.statuses(self._store.overview.moving(limit)).values()]

    def tempo(self, batch: BatchStatus) -> Tempo:
        """How fast a batch goes, and how long it still takes."""
        return self._store.overview.tempo(batch)

    def failed(self, batch_id: str, limit: int = 10) -> list[JobInfo]:
        """The jobs of a batch that failed last, newest first."""
        return self._store.overview.failed(batch_id, limit)

    def job(self, job_id: str) -> Job:
        """A job by its id; raises `NotFound`."""
        if not _is_name(job_id):
            raise NotFound(f"there is no job {shown(job_id)}")
        return Job(self._store, self._storage, self.settings, self._store.queries.job(job_id))

    def owner(self, name: str) -> Owner:
        """Whoever submits under that name, whether or not there is anything of theirs yet.

        Raises `InvalidInput` if nobody can.
        """
        if not _is_name(name):
            raise InvalidInput([Problem("", "owner", _NAMED)])
        return Owner(self._store.steering, name)

    def workers(self) -> list[WorkerInfo]:
        """The workers, what they render on, and the models they hold."""
        return self._store.workers.all()

    def loads(self) -> dict[str, Load]:
        """What each worker does now, by name; one that does nothing is not among them."""
        return self._store.overview.loads()

    def unheld(self, batch_id: str | None = None) -> list[str]:
        """The models that jobs, or a batch's jobs, wait for and no living worker holds; they start when one does."""
        return self._store.overview.unheld(batch_id)

    def too_large(self, batch_id: str | None = None) -> dict[str, int]:
        """The models with jobs, in a batch or at all, that wait because no living worker has the memory for them.

        With the most pixels that a worker allows without guidance. The jobs start when a worker allows more.
        """
        return {model: limit.pixels for model, limit in self.exceeded_limits(batch_id).items()}

    def exceeded_limits(self, batch_id: str | None = None) -> dict[str, MemoryLimit]:
        """The same models, with all that a worker says about its limit."""
        return self._store.overview.too_large(batch_id)

    def waiting(self) -> dict[str, int]:
        """How many jobs of each model wait for a worker."""
        return self._store.overview.waiting_by_model()

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

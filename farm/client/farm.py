"""The Python client: `Farm` submits prompts and finds batches, jobs and workers."""

import getpass
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
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
"""The longest name, owner and key of a batch."""
_NAMED = f"should be 1 to {MAX_NAME_CHARS} characters of valid Unicode, without NUL"


def _is_name(given: object) -> TypeGuard[str]:
    """Whether both databases can store it: PostgreSQL has no NUL, and neither stores lone surrogates."""
    if not isinstance(given, str) or len(given) > MAX_NAME_CHARS or "\x00" in given:
        return False
    try:
        given.encode()
    except UnicodeEncodeError:
        return False
    return True


class Farm:
    """A client of one farm.

    `Farm()` reads its settings from `FARM_*` in the environment, or uses the embedded farm that `farm up` started in
    this folder. Use it as a context manager, or `close` it. Thread-safe.

    Raises `NotConfigured` if no farm is configured, `DatabaseUnavailable` if its database does not answer, and
    `SchemaMismatch` if its schema has another version.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings.load()
        with ExitStack() as opened:
            self._db = Database(self.settings.database_url)
            opened.callback(self._db.close)
            self._db.check_schema()
            self._storage = Storage(self.settings)
            opened.callback(self._storage.close)
            self._broker = Broker(self.settings)
            opened.callback(self._broker.close)
            self._opened = opened.pop_all()
        self._store = JobStore.over(self._db, self.settings)

    def check(self) -> None:
        """Raise `ServiceUnavailable` for the first service that does not answer."""
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
        """Submit prompts, specs, mappings of spec fields, or files of them (`Path`), atomically.

        Further keyword arguments are defaults for the fields that a prompt or mapping omits, such as
        `num_inference_steps=30, model="sd15"`; a `RenderSpec` is used unchanged. `priority` is 0 to 100; higher
        priorities run first. On return the jobs are durable in SQL, and the first of them are in Redis. If Redis does
        not answer, a warning is logged and the jobs start when it is back. Iterables are read row by row.

        - `grid={"steps": [20, 30], "guidance": [5, 7.5]}` renders each row with each combination, and
          `seeds=range(10)` renders each of these with each seed. Both override the row's values.
        - `template="a {animal} in {style}"` makes prompts from the columns of a file, or the keys of a mapping.
        - `wildcards=True` picks a choice of `{red|blue}` in prompts, and a line of `wildcards/animal.txt` for
          `__animal__`; a path names another folder. The choices are reproducible: they depend on `wildcard_seed`, or
          on the spec's seed.

        A `key` makes the submission idempotent, so it can be repeated after an error with an unclear result: the same
        specs in the same order return the same batch. Omitted seeds are derived from the key and the position.

        A job whose spec, with a chosen seed, was already rendered by a model with the same weights gets a copy of that
        picture; identical jobs in flight are rendered once. `reuse=False` renders every job.

        A sampler that the spec's model cannot use, according to the live workers, is rejected; a model without a
        worker is accepted. Raises `InvalidInput` with all problems, `KeyUsed` if the key was used for other specs, and
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
            log.warning("batch %s is stored in SQL, and starts when the service is back: %s", batch_id, error)
        try:
            return self.batch(batch_id)
        except DatabaseUnavailable as error:
            raise DatabaseUnavailable(f"batch {batch_id} is submitted, but {error}") from error

    def dry_run(self, what: Given | Iterable[Given], **options: Any) -> DryRun:
        """The number of pictures, first specs and device seconds of a submission; writes nothing.

        Takes the arguments of `submit`, and raises the same errors.
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
        """The batch with this id, or the newest batch with this name; raises `NotFound`."""
        if not _is_name(name_or_id):  # no database stores such a name, and some refuse the query
            raise NotFound(f"there is no batch {shown(name_or_id)}; `farm status` lists them")
        return Batch(self._store, self._storage, self.settings, self._store.queries.batch(name_or_id))

    def batches(self, limit: int = 20) -> list[BatchStatus]:
        """The status of the newest batches, newest first."""
        return self._store.queries.batches(limit)

    def moving(self, limit: int = 20) -> list[BatchStatus]:
        """The status of the batches with queued or running jobs."""
        return [*self._store.overview.statuses(self._store.overview.moving(limit)).values()]

    def tempo(self, batch: BatchStatus) -> Tempo:
        """The rate and the ETA of a batch."""
        return self._store.overview.tempo(batch)

    def failed(self, batch_id: str, limit: int = 10) -> list[JobInfo]:
        """The last failed jobs of a batch, newest first."""
        return self._store.overview.failed(batch_id, limit)

    def job(self, job_id: str) -> Job:
        """A job by its id; raises `NotFound`."""
        if not _is_name(job_id):
            raise NotFound(f"there is no job {shown(job_id)}")
        return Job(self._store, self._storage, self.settings, self._store.queries.job(job_id))

    def owner(self, name: str) -> Owner:
        """The owner with that name, whether or not it has batches.

        Raises `InvalidInput` for an invalid name.
        """
        if not _is_name(name):
            raise InvalidInput([Problem("", "owner", _NAMED)])
        return Owner(self._store.steering, name)

    def workers(self) -> list[WorkerInfo]:
        """The workers, their devices and their models."""
        return self._store.workers.all()

    def loads(self) -> dict[str, Load]:
        """The current load of each worker by name, without idle workers."""
        return self._store.overview.loads()

    def unheld(self, batch_id: str | None = None) -> list[str]:
        """The models of waiting jobs, in all or in one batch, that no live worker serves."""
        return self._store.overview.unheld(batch_id)

    def too_large(self, batch_id: str | None = None) -> dict[str, int]:
        """The models with waiting jobs, in all or in one batch, that are too large for the memory of every live worker.

        Maps each to the most pixels that a worker allows without guidance. The jobs start when a worker allows more.
        """
        return {model: limit.pixels for model, limit in self.exceeded_limits(batch_id).items()}

    def exceeded_limits(self, batch_id: str | None = None) -> dict[str, MemoryLimit]:
        """The same models, with the full limit that a worker reports."""
        return self._store.overview.too_large(batch_id)

    def waiting(self) -> dict[str, int]:
        """The number of waiting jobs by model."""
        return self._store.overview.waiting_by_model()

    def close(self) -> None:
        """Close every connection."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

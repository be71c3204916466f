"""Reuse of pictures: a job gets a copy of an existing picture of the same work, and waits for a duplicate under way.

The same work is the same spec, seed included, by a model with the same weights. This module begins and records copies;
`farm.dispatch.copier` makes them.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session, aliased, selectinload

from farm.jobs.artifacts import PICTURE_COLUMNS, artifacts_of, copy_artifacts
from farm.jobs.conditions import JOB_PAUSED, in_state
from farm.jobs.database import Database, now
from farm.jobs.leadership import DISPATCHER, holder_of
from farm.jobs.schema import AttemptRow, BatchRow, JobRow
from farm.jobs.states import JobState, Outcome
from farm.jobs.transitions import UNQUEUE, Ending, Move, finalize
from farm.jobs.workers import live_models
from farm.specs.object_keys import beside, image_key

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copying:
    """A copy that was begun, under an attempt of its own."""

    job_id: str
    attempt: int
    source_id: str
    bytes: int
    """The size of the picture, which is the first of the keys."""
    keys: Mapping[str, str]
    """The key of each copy, by the key of its source."""


@dataclass
class _Twin:
    """A job that is queued or running."""

    job_id: str
    state: JobState
    priority: int


class Chosen(NamedTuple):
    """The jobs to be rendered now, chosen from some jobs."""

    job_ids: list[str]
    last: int | None
    """The position up to which every job was decided on; later jobs must be read again."""


class Works:
    """Work that is done or under way, for one pass of the dispatcher; read lazily, in the transaction of the pass.

    With `copy`, a job whose picture exists is not rendered: it is added to `copies`. Without, it is rendered. In both
    cases, jobs wait for a duplicate that is under way. While no dispatcher leads, every job is rendered: nothing would
    make the copies or dispatch the waiting jobs.
    """

    def __init__(self, session: Session, lease_seconds: float, *, copy: bool) -> None:
        self._session = session
        self._lease_seconds = lease_seconds
        self._copy = copy
        self._passed_by: list[str] = []
        self.copies: dict[str, str] = {}
        """The job whose picture is copied, by the job that gets the copy."""

    def choose(self, rows: Sequence[sa.Row[Any]], model: str, priority: int, most: int) -> Chosen:
        """Choose which of a model's jobs are rendered now, at most `most`."""
        job_ids: list[str] = []
        last: int | None = None
        decided = True
        works = {row.work_sha256 for row in rows} - {None}
        done = self._done(model, works) if works and self._copy and self._led else {}
        for row in rows:
            work = row.work_sha256
            if work in done:
                if (source := done[work]) is not None:
                    self.copies[row.id] = source
            elif len(job_ids) == most:
                decided = False  # jobs after this one may still get copies
            elif work is None or not self._led or self._goes_first(row.id, work, priority):
                job_ids.append(row.id)
            last = row.position if decided else last
        return Chosen(job_ids, last)

    def put_back(self) -> None:
        """Return queued jobs to the backlog that now wait for a duplicate of higher priority."""
        if self._passed_by:
            self._session.execute(UNQUEUE.update.where(JobRow.id.in_(self._passed_by)))
            log.info("put back behind duplicates of a higher priority: %s", ", ".join(self._passed_by))
            self._passed_by = []

    def _goes_first(self, job_id: str, work: str, priority: int) -> bool:
        """Whether no duplicate is under way; a queued job of lower priority is put back and does not count."""
        twin = self._under_way.get(work)
        if twin is not None:
            if twin.state is JobState.RUNNING or twin.priority >= priority:
                return False
            self._passed_by.append(twin.job_id)
        self._under_way[work] = _Twin(job_id, JobState.QUEUED, priority)
        return True

    def _done(self, model: str, works: Collection[str]) -> dict[str, str | None]:
        """The job whose picture can be copied, by work; None while no live worker serves the model."""
        weights = self._weights.get(model)
        if weights is not None and len(weights) != 1:
            return {}  # no worker has loaded it, or workers disagree on its weights
        rows = self._session.execute(pictures_of(works)).all()
        return {
            row.work_sha256: None if weights is None else row.id
            for row in rows
            if weights is None or row.model_sha256 in weights
        }

    @cached_property
    def _led(self) -> bool:
        return self._session.scalar(holder_of(DISPATCHER)) is not None

    @cached_property
    def _under_way(self) -> dict[str, _Twin]:
        found: dict[str, _Twin] = {}
        for state in (JobState.QUEUED, JobState.RUNNING):
            for row in self._session.execute(works_in(state)):
                twin = found.get(row.work_sha256)
                if twin is None or state is JobState.RUNNING or row.priority > twin.priority:
                    found[row.work_sha256] = _Twin(row.id, state, row.priority)
        return found

    @cached_property
    def _weights(self) -> dict[str, set[str]]:
        """The hashes of each model's weights, as its live workers report them."""
        found: dict[str, set[str]] = {}
        for models in live_models(self._session, self._lease_seconds):
            for model in models:
                found.setdefault(model.name, set()).update(filter(None, [model.sha256]))
        return found


def works_in(state: JobState) -> sa.Select[*tuple[Any, ...]]:
    """The work of the queued or running jobs: at most the windows, or the slots of all workers."""
    return sa.select(JobRow.work_sha256, JobRow.id, JobRow.priority).where(
        in_state(state), JobRow.work_sha256.is_not(None)
    )


def pictures_of(works: Collection[str]) -> sa.Select[*tuple[Any, ...]]:
    """The jobs with pictures of these works, one job for each hash of weights; without copies, so the rows are few."""
    return (
        sa.select(JobRow.work_sha256, JobRow.model_sha256, sa.func.min(JobRow.id).label("id"))
        .join(BatchRow)
        .where(
            in_state(JobState.SUCCEEDED),
            JobRow.work_sha256.is_not(None),
            JobRow.work_sha256.in_(works),
            JobRow.image_key.is_not(None),
            BatchRow.deleted_at.is_(None),
        )
        .group_by(JobRow.work_sha256, JobRow.model_sha256)
    )


class Reuse:
    """Begins and records copies of pictures.

    A job stays pending while a copy is made, so that an interruption leaves nothing to undo. The copy has an attempt of
    its own: no worker writes to its key, and it is not recorded once the job has moved on.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    def begin_copies(self, wanted: Mapping[str, str]) -> list[Copying]:
        """Begin a copy for each of these pending jobs, mapped to its source job; each copy is a new attempt."""
        with self._db.write() as session:
            sources = {
                row.id: row
                for row in session.scalars(
                    sa.select(JobRow)
                    .join(BatchRow)
                    .where(
                        JobRow.id.in_(set(wanted.values())),
                        in_state(JobState.SUCCEEDED),
                        JobRow.image_key.is_not(None),
                        BatchRow.deleted_at.is_(None),
                    )
                    .options(selectinload(JobRow.artifacts))
                )
            }
            taken = session.execute(
                sa.update(JobRow)
                .where(
                    in_state(JobState.PENDING),
                    JobRow.id.in_([job_id for job_id, source_id in wanted.items() if source_id in sources]),
                    ~JOB_PAUSED,
                )
                .values(
                    attempt=JobRow.attempt + 1,
                    started_at=now(),
                    # If the copy is not recorded, its objects are swept when the job has ended.
                    leftovers=True,
                )
                .returning(JobRow.id, JobRow.attempt, JobRow.batch_id, JobRow.position, JobRow.spec)
            ).all()
            if taken:
                session.execute(sa.insert(AttemptRow).values([_begun(row, wanted[row.id]) for row in taken]))
            return [_copying(row, sources[wanted[row.id]]) for row in taken]

    def record_copies(self, made: Sequence[Copying]) -> list[Copying]:
        """Record copies whose objects are stored; returns those that came too late, whose objects belong to no job.

        The facts of the picture are copied too, its render seconds included. A copy is never a source itself, so that
        sources stay few.
        """
        late = []
        with self._db.write() as session:
            for one in made:
                source = aliased(JobRow)
                move = Move({JobState.PENDING: JobState.SUCCEEDED}, **_facts_of(source, one))
                recorded = finalize(
                    session,
                    move,
                    JobRow.id == one.job_id,
                    JobRow.attempt == one.attempt,
                    sa.exists().where(source.id == one.source_id, source.image_key.is_not(None)),
                    # The job's own batch may be marked for deletion by now, and its objects deleted.
                    sa.exists().where(BatchRow.id == JobRow.batch_id, BatchRow.deleted_at.is_(None)).correlate(JobRow),
                    ending=Ending(Outcome.SUCCEEDED.value, reason=f"a copy of {one.source_id}"),
                    note=f" copy_of={one.source_id}",
                )
                if recorded:
                    session.execute(copy_artifacts(one.source_id, one.job_id, one.keys))
                else:
                    late.append(one)
        for one in late:
            log.warning("too late job_id=%s attempt=%d", one.job_id, one.attempt)
        return late

    def withdraw(self, job_id: str) -> None:
        """Exclude a job's picture from reuse: it does not match its record in SQL."""
        with self._db.write() as session:
            session.execute(
                sa.update(JobRow).where(JobRow.id == job_id, in_state(JobState.SUCCEEDED)).values(work_sha256=None)
            )


def _begun(row: sa.Row[Any], source_id: str) -> dict[str, Any]:
    return {
        "job_id": row.id,
        "attempt": row.attempt,
        "started_at": now(),
        "ended_at": now(),
        "outcome": Outcome.HANDED_BACK.value,
        "reason": f"a copy of {source_id} was begun",
        "steps_done": 0,
    }


def _copying(row: sa.Row[*tuple[Any, ...]], source: JobRow) -> Copying:
    picture, *others = [artifact.key for artifact in artifacts_of(source)]
    key = image_key(row.batch_id, row.position, row.attempt, row.spec["prompt"])
    keys = {picture: key, **{other: beside(key, picture, other) for other in others}}
    return Copying(row.id, row.attempt, source.id, source.image_bytes or 0, keys)


def _facts_of(source: type[JobRow], one: Copying) -> dict[str, Any]:
    copied = {
        column: sa.select(getattr(source, column)).where(source.id == one.source_id).scalar_subquery()
        for column in ("steps_done", *PICTURE_COLUMNS)
    }
    return {
        "not_before": None,
        "error": None,
        "worker": None,
        "reused_from": one.source_id,
        "work_sha256": None,
        # A job without earlier attempts has no objects beside its picture.
        "leftovers": False if one.attempt == 1 else JobRow.leftovers,
        **copied,
        "image_key": next(iter(one.keys.values())),
    }

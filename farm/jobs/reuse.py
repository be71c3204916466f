"""The same work once: a job whose picture another job has already gets a copy of it, and twins wait for each other.

The same work is the same spec, seed included, by a model of the same weights. Copies are begun and recorded here, and
made by `farm.dispatch.copier`.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session, aliased, selectinload

from farm.jobs.artifacts import artifacts_of, copy_artifacts
from farm.jobs.conditions import JOB_PAUSED, in_state
from farm.jobs.database import Database, now
from farm.jobs.leadership import DISPATCHER
from farm.jobs.schema import AttemptRow, BatchRow, JobRow, LeaderRow
from farm.jobs.states import JobState, Outcome
from farm.jobs.transitions import UNQUEUE, Ending, Move, finalize
from farm.jobs.workers import live_models
from farm.specs.object_keys import beside, image_key

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copying:
    """A copy that was begun: from which keys to which, under an attempt that is nobody else's."""

    job_id: str
    attempt: int
    source_id: str
    bytes: int
    """How large the picture is, which is the first of the keys."""
    keys: Mapping[str, str]
    """The keys of the copies, by those of the sources."""


@dataclass
class _Twin:
    """A job that is queued or running."""

    job_id: str
    state: JobState
    priority: int


class Chosen(NamedTuple):
    """Which of some jobs are to be rendered now."""

    job_ids: list[str]
    last: int | None
    """The position up to which every job was decided on; the jobs after it have to be read again."""


class Works:
    """What one pass of the dispatcher knows of work that is done or under way; read in its transaction, when needed.

    With `copy`, a job whose picture exists is not rendered: it is added to `copies`. Without, it is rendered. Jobs wait
    for a duplicate that is under way in both cases. While no dispatcher leads, nothing would make the copies, nor
    continue with the jobs that wait, and every job is rendered.
    """

    def __init__(self, session: Session, lease_seconds: float, *, copy: bool) -> None:
        self._session = session
        self._lease_seconds = lease_seconds
        self._copy = copy
        self._passed_by: list[str] = []
        self.copies: dict[str, str] = {}
        """The jobs that are to get a copy of a picture, and the job that has it."""

    def choose(self, rows: Sequence[sa.Row[Any]], model: str, priority: int, most: int) -> Chosen:
        """Choose which of a model's jobs are to be rendered now, at most so many."""
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
        """Return to the backlog what was queued, and is to wait for a twin of a higher priority now."""
        if self._passed_by:
            self._session.execute(UNQUEUE.update.where(JobRow.id.in_(self._passed_by)))
            log.info("put back behind twins of a higher priority: %s", ", ".join(self._passed_by))
            self._passed_by = []

    def _goes_first(self, job_id: str, work: str, priority: int) -> bool:
        """Whether no twin is under way, but for one that still lies in Redis at a lower priority."""
        twin = self._under_way.get(work)
        if twin is not None:
            if twin.state is JobState.RUNNING or twin.priority >= priority:
                return False
            self._passed_by.append(twin.job_id)
        self._under_way[work] = _Twin(job_id, JobState.QUEUED, priority)
        return True

    def _done(self, model: str, works: Collection[str]) -> dict[str, str | None]:
        """The job whose picture serves, by work; None where only the worker that comes up can tell."""
        weights = self._weights.get(model)
        if weights is not None and len(weights) != 1:
            return {}  # nobody has loaded it, or not everybody the same
        rows = self._session.execute(pictures_of(works)).all()
        return {
            row.work_sha256: None if weights is None else row.id
            for row in rows
            if weights is None or row.model_sha256 in weights
        }

    @cached_property
    def _led(self) -> bool:
        leader = sa.select(LeaderRow.holder).where(LeaderRow.name == DISPATCHER, LeaderRow.until > now())
        return self._session.scalar(leader) is not None

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
        """The hashes of each model's weights that the live workers which serve it report."""
        found: dict[str, set[str]] = {}
        for models in live_models(self._session, self._lease_seconds):
            for model in models:
                found.setdefault(model.name, set()).update(filter(None, [model.sha256]))
        return found


def works_in(state: JobState) -> sa.Select[*tuple[Any, ...]]:
    """The work of the jobs that are queued, or running: as many as a window, or as the workers hold."""
    return sa.select(JobRow.work_sha256, JobRow.id, JobRow.priority).where(
        in_state(state), JobRow.work_sha256.is_not(None)
    )


def pictures_of(works: Collection[str]) -> sa.Select[*tuple[Any, ...]]:
    """The jobs that have pictures of these works, one of each weights' hash; copies are none, so that they are few."""
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
    """Copies of pictures, begun and recorded.

    A job stays pending while a copy is made, so that nothing has to be undone when that breaks off. But the copy has
    an attempt of its own: no worker writes to its key, and it is no longer recorded once the job has gone elsewhere.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    def begin_copies(self, wanted: Mapping[str, str]) -> list[Copying]:
        """Take an attempt of each of these pending jobs for a copy of the picture of the job that it is mapped to."""
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
                    # So that what it leaves is swept when the job has ended, unless this is how it ends.
                    leftovers=True,
                )
                .returning(JobRow.id, JobRow.attempt, JobRow.batch_id, JobRow.position, JobRow.spec)
            ).all()
            if taken:
                session.execute(sa.insert(AttemptRow).values([_begun(row, wanted[row.id]) for row in taken]))
            return [_copying(row, sources[wanted[row.id]]) for row in taken]

    def record_copies(self, made: Sequence[Copying]) -> list[Copying]:
        """Record copies whose objects are there; returns those that came too late, and whose objects are nobody's.

        All that is known of the picture comes with it, what it took to render included; a copy of its own serves
        nobody, so that what may serve is few however often it did.
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
        """Let the picture of a job serve no other any more: it is not what SQL says."""
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


_FACTS = (
    "steps_done",
    "image_sha256",
    "image_bytes",
    "width",
    "height",
    "model_sha256",
    "render_seconds",
    "device_seconds",
    "warnings",
)
"""What a job has from the one whose picture it copies."""


def _facts_of(source: type[JobRow], one: Copying) -> dict[str, Any]:
    copied = {
        name: sa.select(getattr(source, name)).where(source.id == one.source_id).scalar_subquery() for name in _FACTS
    }
    return {
        "not_before": None,
        "error": None,
        "worker": None,
        "image_key": next(iter(one.keys.values())),
        "reused_from": one.source_id,
        "work_sha256": None,
        # Nothing lies beside the picture of a job that was never attempted before.
        "leftovers": False if one.attempt == 1 else JobRow.leftovers,
        **copied,
    }

"""`Backlog`: which of the jobs that wait in SQL go to Redis next, and what that is charged to whom.

A pass costs as much as there are batches in line and jobs to be moved, however many jobs wait behind them: batches
are found one by one over the backlog's index, and of each only as many jobs are read as are its turn.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.jobs.conditions import BATCH_PAUSED, VISIBLE, in_state, models_in
from farm.jobs.database import Database, now
from farm.jobs.fair_share import Charge, FairLine, Ledger, Owner, Served, Share, window
from farm.jobs.memory_limits import Limits, allowed, memory_limits
from farm.jobs.records import Doorbell
from farm.jobs.reuse import Works
from farm.jobs.schema import BatchRow, JobRow, OwnerRow
from farm.jobs.served_models import MemoryLimit
from farm.jobs.states import JobState
from farm.jobs.transitions import UNQUEUE, Move
from farm.jobs.workers import live_models
from farm.settings import Settings
from farm.specs.spec import URGENT

log = logging.getLogger(__name__)

_DISPATCH_LOCK = 0x66617264
_SETTLE_SECONDS = 1.0
_SETTLE_CHUNK = 500
_MEASURED = 16
"""From how many of a batch's last jobs a dispatcher that knows nothing yet learns what one costs."""


@dataclass
class _InFlight:
    """What is queued or running now."""

    by_batch: dict[str, int]
    queued_by_kind: dict[tuple[str, bool], int]
    """By model, and whether they are urgent: these have a window of their own, so that no bulk work is in their way."""
    queued_by_owner: dict[str, int]


class Backlog:
    """Jobs that wait, and how they get their turn."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._lease_seconds = settings.lease_seconds
        self._starvation_seconds = settings.starvation_seconds
        self._most_queued = settings.most_queued
        self._ledger = Ledger()
        self._settled_at = -_SETTLE_SECONDS
        self._memory_limits: Limits = {}
        self._seen: dict[tuple[str, str], int] = {}
        """How far the jobs of a batch have been looked at, of a model, where many of them wait for others."""

    def enqueue(
        self, most: int, *, slots: Mapping[str, int] | None = None, copies: dict[str, str] | None = None
    ) -> list[Doorbell]:
        """Move jobs from the backlog to queued, in the order they are to be served, until each model has its window.

        `most` is the window, by model; `slots` is how many the live workers of each model have, where the window
        should be no larger than these need. The caller publishes what comes back, in this order, after this has
        committed. `copies` takes the jobs whose turn it would be and of which there is a picture, with the job that
        has it; without it they are rendered. What has a twin under way waits.
        """
        bells: list[Doorbell] = []
        with self._db.write() as session:
            self._db.exclusive(session, _DISPATCH_LOCK)
            self._settle(session)
            models = list(models_in(session, JobState.PENDING))
            if not models:
                return []
            in_flight = _in_flight(session)
            works = Works(session, self._lease_seconds, copies)
            self._memory_limits = memory_limits(live_models(session, self._lease_seconds))
            for model in models:
                rows = session.execute(in_line(model)).all()
                for urgent in (True, False):
                    kind = [row for row in rows if (row.priority >= URGENT) is urgent]
                    if kind and in_flight.queued_by_kind.get((model, urgent), 0) < most:
                        bells += self._enqueue_kind(session, model, kind, most, slots, in_flight, works)
                        if urgent:  # what its owner has just been charged counts
                            rows = session.execute(in_line(model)).all()
        return bells

    def unqueue(self, job_ids: Sequence[str]) -> int:
        """Put queued jobs back into the backlog: their messages were not published, or are gone; returns how many."""
        with self._db.write() as session:
            moved = session.execute(UNQUEUE.update.where(JobRow.id.in_(job_ids)).returning(JobRow.id)).all()
        return len(moved)

    def queued_models(self) -> list[str]:
        """The models that have queued jobs."""
        with self._db.read() as session:
            return list(models_in(session, JobState.QUEUED))

    def queued(self, model: str) -> list[str]:
        """The ids of a model's queued jobs; at most a window of them."""
        with self._db.read() as session:
            return list(session.scalars(sa.select(JobRow.id).where(in_state(JobState.QUEUED), JobRow.model == model)))

    def _enqueue_kind(
        self,
        session: Session,
        model: str,
        rows: Sequence[sa.Row[Any]],
        most: int,
        slots: Mapping[str, int] | None,
        in_flight: _InFlight,
        works: Works,
    ) -> list[Doorbell]:
        line, batches = self._line(session, model, rows, in_flight)
        if slots is not None:
            most = window(slots.get(model, 0), most)
        room = most - in_flight.queued_by_kind.get((model, rows[0].priority >= URGENT), 0)
        turns = self._turns(session, model, line, room, works)
        if not turns:
            return []
        works.put_back()
        moved = _move(session, turns)
        for job_id, served in turns:
            owner = batches[served.batch_id].owner
            in_flight.queued_by_owner[owner] = in_flight.queued_by_owner.get(owner, 0) + 1
            in_flight.by_batch[served.batch_id] = in_flight.by_batch.get(served.batch_id, 0) + 1
            self._ledger.charge(job_id, Charge(served.batch_id, owner, model, served.seconds))
        _charge(session, line, {served.batch_id for _, served in turns})
        return [
            _doorbell(job_id, model, served.priority, batches[served.batch_id], moved[job_id])
            for job_id, served in turns
            if job_id in moved
        ]

    def _line(
        self, session: Session, model: str, rows: Sequence[sa.Row[Any]], in_flight: _InFlight
    ) -> tuple[FairLine, dict[str, sa.Row[Any]]]:
        owners: dict[str, Owner] = {}
        shares = []
        for row in rows:
            if not self._ledger.knows(row.id):
                for seconds in reversed(session.scalars(_last_measured(row.id)).all()):
                    self._ledger.measured(row.id, model, seconds)
            flying = in_flight.by_batch.get(row.id, 0)
            last = max(row.accepted_at, row.last_finished_at or row.accepted_at)
            shares.append(
                Share(
                    batch_id=row.id,
                    owner=row.owner,
                    priority=row.priority,
                    weight=row.weight,
                    virtual_time=row.virtual_time,
                    seconds=self._ledger.seconds(row.id, model),
                    in_flight=flying,
                    unserved_seconds=0.0 if flying else (row.now - last).total_seconds(),
                )
            )
            cap = self._most_queued if row.most_queued is None else row.most_queued
            room = None if cap is None else max(0, cap - in_flight.queued_by_owner.get(row.owner, 0))
            owners[row.owner] = Owner(row.owner, row.owner_weight or 1.0, row.owner_virtual_time or 0.0, room)
        line = FairLine(shares, owners.values(), starvation_seconds=self._starvation_seconds)
        return line, {row.id: row for row in rows}

    def _turns(self, session: Session, model: str, line: FairLine, room: int, works: Works) -> list[tuple[str, Served]]:
        """Which job is whose turn, in serving order."""
        turns: list[tuple[str, Served]] = []
        reached: dict[str, int] = defaultdict(int)
        # A batch in line may have fewer jobs than its turns, since some wait for another try, or for a twin: the
        # others get them.
        while len(turns) < room and (served := line.take(room - len(turns))):
            by_batch: dict[str, list[Served]] = defaultdict(list)
            for each in served:
                by_batch[each.batch_id].append(each)
            jobs = {}
            for batch_id, its in by_batch.items():
                found, reached[batch_id] = self._next(session, model, its, reached[batch_id], works)
                jobs[batch_id] = iter(found)
            for each in served:
                job_id = next(jobs[each.batch_id], None)
                if job_id is None:
                    line.give_back(each)
                else:
                    turns.append((job_id, each))
        return turns

    def _next(
        self, session: Session, model: str, its: Sequence[Served], reached: int, works: Works
    ) -> tuple[list[str], int]:
        """A batch's next jobs for its turns, after the place that it has reached; and the place it reaches with them.

        A thousand that wait for twins, or for copies, must not hold up who comes behind them: where there are any,
        a pass looks so much further, and the next one goes on from there.
        """
        batch_id, priority = its[0].batch_id, max(each.priority for each in its)
        limits = self._memory_limits.get(model, ())
        rows = session.execute(next_jobs(model, batch_id, len(its), reached, limits)).all()
        found, last = works.to_render(rows, model, priority, len(its))
        reached = reached if last is None else last
        if len(found) < len(its) == len(rows) and works.further > 0:
            seen = self._seen.get((model, batch_id), 0)
            rows = session.execute(next_jobs(model, batch_id, works.further, max(reached, seen), limits)).all()
            more, last = works.to_render(rows, model, priority, len(its) - len(found))
            reached = reached if last is None else last
            found += more
            self._seen[model, batch_id] = reached
            if len(rows) < works.further and (not rows or last == rows[-1].position):
                del self._seen[model, batch_id]  # the end: from the first again
            works.further -= len(rows)
        return found, reached

    def _settle(self, session: Session) -> None:
        """Correct what was charged for jobs of which it is known by now what they took."""
        if time.monotonic() - self._settled_at < _SETTLE_SECONDS:
            return
        self._settled_at = time.monotonic()
        unknown = self._ledger.open()
        took: dict[str, float | None] = {}
        for start in range(0, len(unknown), _SETTLE_CHUNK):
            some = unknown[start : start + _SETTLE_CHUNK]
            found = {
                row.id: row
                for row in session.execute(
                    sa.select(JobRow.id, JobRow.state, JobRow.device_seconds, JobRow.render_seconds).where(
                        JobRow.id.in_(some)
                    )
                )
            }
            for job_id in some:
                row = found.get(job_id)
                state = JobState.CANCELLED if row is None else JobState(row.state)
                if state is JobState.PENDING:
                    took[job_id] = 0.0
                elif row is not None and state is JobState.SUCCEEDED:
                    took[job_id] = row.render_seconds if row.device_seconds is None else row.device_seconds
                elif state.terminal:
                    took[job_id] = None
        corrections = self._ledger.settle(took)
        for table, name, by in (
            (BatchRow, BatchRow.id, corrections.batches),
            (OwnerRow, OwnerRow.name, corrections.owners),
        ):
            for one, seconds in sorted(by.items()):
                right = table.virtual_time + seconds / table.weight
                session.execute(
                    sa.update(table).where(name == one).values(virtual_time=sa.case((right > 0, right), else_=0.0))
                )


def batches_waiting(model: str) -> sa.CTE:
    """The ids of the batches that have jobs of a model in the backlog: as many look-ups as there are such batches."""
    first = sa.select(sa.func.min(JobRow.batch_id)).where(in_state(JobState.PENDING), JobRow.model == model)
    waiting = sa.select(first.scalar_subquery().label("batch_id")).cte("waiting", recursive=True)
    following = first.where(JobRow.batch_id > waiting.c.batch_id).correlate(waiting)
    return waiting.union_all(sa.select(following.scalar_subquery()).where(waiting.c.batch_id.is_not(None)))


def in_line(model: str) -> sa.Select[*tuple[Any, ...]]:
    """The batches that have jobs of a model in the backlog and may be served, with their owners, first come first."""
    waiting = batches_waiting(model)
    finished = sa.select(sa.func.max(JobRow.finished_at)).where(JobRow.batch_id == BatchRow.id).correlate(BatchRow)
    return (
        sa.select(
            BatchRow.id,
            BatchRow.name,
            BatchRow.owner,
            BatchRow.priority,
            BatchRow.total,
            BatchRow.weight,
            BatchRow.virtual_time,
            BatchRow.accepted_at,
            finished.scalar_subquery().label("last_finished_at"),
            now().label("now"),
            OwnerRow.weight.label("owner_weight"),
            OwnerRow.virtual_time.label("owner_virtual_time"),
            OwnerRow.most_queued,
        )
        .join(waiting, waiting.c.batch_id == BatchRow.id)
        .outerjoin(OwnerRow, OwnerRow.name == BatchRow.owner)
        .where(VISIBLE, ~BATCH_PAUSED)
        .order_by(BatchRow.accepted_at, BatchRow.id)
    )


def next_jobs(
    model: str, batch_id: str, count: int, after: int = 0, limits: Sequence[MemoryLimit] = ()
) -> sa.Select[*tuple[Any, ...]]:
    """The next jobs of a batch that may be dispatched, by their places, from the one after that place.

    Without those that are larger than all of the `limits` allow; with no limits, every job may be.
    """
    return (
        sa.select(JobRow.id, JobRow.position, JobRow.work_sha256)
        .where(
            in_state(JobState.PENDING),
            JobRow.model == model,
            JobRow.batch_id == batch_id,
            JobRow.position > after,
            sa.or_(JobRow.not_before.is_(None), JobRow.not_before <= now()),
            ~JobRow.paused,
            *((allowed(limits),) if limits else ()),
        )
        .order_by(JobRow.position)
        .limit(count)
    )


def _last_measured(batch_id: str) -> sa.Select[Any]:
    last = (
        sa.select(sa.func.coalesce(JobRow.device_seconds, JobRow.render_seconds).label("seconds"), JobRow.finished_at)
        .where(JobRow.batch_id == batch_id, JobRow.finished_at.is_not(None))
        .order_by(JobRow.finished_at.desc())
        .limit(_MEASURED)
        .subquery()
    )
    return sa.select(last.c.seconds).where(last.c.seconds.is_not(None)).order_by(last.c.finished_at.desc())


def _in_flight(session: Session) -> _InFlight:
    found = _InFlight({}, {}, {})
    for state in (JobState.QUEUED, JobState.RUNNING):
        rows = session.execute(
            sa.select(JobRow.model, JobRow.batch_id, BatchRow.priority, BatchRow.owner, sa.func.count())
            .join(BatchRow)
            .where(in_state(state))
            .group_by(JobRow.model, JobRow.batch_id, BatchRow.priority, BatchRow.owner)
        )
        for model, batch_id, priority, owner, count in rows:
            found.by_batch[batch_id] = found.by_batch.get(batch_id, 0) + count
            if state is JobState.QUEUED:
                kind = model, priority >= URGENT
                found.queued_by_kind[kind] = found.queued_by_kind.get(kind, 0) + count
                found.queued_by_owner[owner] = found.queued_by_owner.get(owner, 0) + count
    return found


def _move(session: Session, turns: Sequence[tuple[str, Served]]) -> dict[str, sa.Row[Any]]:
    """Queue these jobs; a job whose batch would have starved counts with the first from now on, in the engine too."""
    by_priority: dict[int, list[str]] = defaultdict(list)
    for job_id, served in turns:
        by_priority[served.priority].append(job_id)
    moved: dict[str, sa.Row[Any]] = {}
    for priority, job_ids in by_priority.items():
        queue = Move({JobState.PENDING: JobState.QUEUED}, queued_at=now(), priority=priority).update
        rows = session.execute(queue.where(JobRow.id.in_(job_ids)).returning(JobRow.id, JobRow.spec, JobRow.position))
        moved.update({row.id: row for row in rows})
    return moved


def _charge(session: Session, line: FairLine, batch_ids: Iterable[str]) -> None:
    shares = [line.share(batch_id) for batch_id in sorted(batch_ids)]
    session.execute(
        sa.update(BatchRow), [{"id": share.batch_id, "virtual_time": share.virtual_time} for share in shares]
    )
    session.execute(
        sa.text(
            "INSERT INTO owners (name, virtual_time) VALUES (:name, :virtual_time) "
            "ON CONFLICT (name) DO UPDATE SET virtual_time = excluded.virtual_time"
        ),
        [
            {"name": name, "virtual_time": line.owners[name].virtual_time}
            for name in sorted({share.owner for share in shares})
        ],
    )


def _doorbell(job_id: str, model: str, priority: int, batch: sa.Row[Any], job: sa.Row[Any]) -> Doorbell:
    return Doorbell(
        job_id=job_id,
        model=model,
        priority=priority,
        # The prompt early: Flower's page cuts a long text short.
        shown=f"{_shortened(batch.name, 40)} {job.position}/{batch.total}: {_shortened(job.spec['prompt'], 80)} "
        f"(model {model})",
    )


def _shortened(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"

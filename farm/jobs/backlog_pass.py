"""`BacklogPass`: one pass over the backlog, which fills each model's window from its batches in serving order."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.jobs.conditions import in_state
from farm.jobs.costs import Costs
from farm.jobs.database import now
from farm.jobs.fair_share import FairLine, Owner, Served, Share
from farm.jobs.memory_limits import Limits
from farm.jobs.records import Doorbell
from farm.jobs.reuse import Works
from farm.jobs.schema import BatchRow, JobRow
from farm.jobs.states import JobState
from farm.jobs.transitions import Move
from farm.jobs.waiting import in_line, next_jobs
from farm.specs.spec import URGENT

AHEAD = 1000
"""How many jobs a pass reads beyond its turns, where jobs wait for duplicates or for copies."""


class BacklogPass:
    """One pass over the backlog, in one transaction."""

    def __init__(
        self,
        session: Session,
        *,
        window: Callable[[str], int],
        works: Works,
        limits: Limits,
        costs: Costs,
        ahead: dict[tuple[str, str], int],
        starvation_seconds: float,
        most_queued: int | None,
    ) -> None:
        self._session = session
        self._window = window
        self.works = works
        self._limits = limits
        self._costs = costs
        self._ahead = ahead
        """The position up to which jobs were read ahead, by model and batch: the next pass resumes there."""
        self._ahead_left = AHEAD
        self._reached: dict[tuple[str, str], int] = defaultdict(int)
        """The position up to which this pass has decided on every job, by model and batch."""
        self._starvation_seconds = starvation_seconds
        self._most_queued = most_queued
        self._in_flight = Counter[str]()
        """The queued and running jobs of each batch."""
        self._queued_by_kind = Counter[tuple[str, bool]]()
        """By model and urgency: urgent jobs have a window of their own, so that bulk work never delays them."""
        self._queued_by_owner = Counter[str]()
        self._count_in_flight()
        self.queued: list[Doorbell] = []

    def serve(self, model: str) -> None:
        """Fill the windows of a model, that of urgent jobs first."""
        rows: Sequence[sa.Row[Any]] | None = None
        for urgent in (True, False):
            room = self._window(model) - self._queued_by_kind[model, urgent]
            if room > 0:
                if rows is None:
                    rows = self._session.execute(in_line(model)).all()
                kind = [row for row in rows if (row.priority >= URGENT) is urgent]
                if kind and self._fill(model, kind, room):
                    rows = None  # the owners were charged for urgent jobs meanwhile

    def _fill(self, model: str, batches: Sequence[sa.Row[Any]], room: int) -> bool:
        """Queue as many jobs of these batches as there is room for; returns whether there were any."""
        line = self._line(model, batches)
        turns = self._turns(model, line, room)
        if not turns:
            return False
        self.works.put_back()
        moved = _queue(self._session, turns)
        by_id = {row.id: row for row in batches}
        for job_id, served in turns:
            batch = by_id[served.batch_id]
            self._in_flight[batch.id] += 1
            self._queued_by_owner[batch.owner] += 1
            if job_id in moved:
                self.queued.append(_doorbell(job_id, model, served.priority, batch, moved[job_id]))
        _write_virtual_times(self._session, line, {served.batch_id for _, served in turns})
        return True

    def _line(self, model: str, batches: Sequence[sa.Row[Any]]) -> FairLine:
        owners: dict[str, Owner] = {}
        shares = []
        costs = self._costs.seconds(self._session, model, [row.id for row in batches])
        for row in batches:
            in_flight = self._in_flight[row.id]
            last = max(row.accepted_at, row.last_finished_at or row.accepted_at)
            shares.append(
                Share(
                    batch_id=row.id,
                    owner=row.owner,
                    priority=row.priority,
                    weight=row.weight,
                    virtual_time=row.virtual_time,
                    seconds=costs[row.id],
                    in_flight=in_flight,
                    unserved_seconds=0.0 if in_flight else (row.now - last).total_seconds(),
                )
            )
            cap = self._most_queued if row.most_queued is None else row.most_queued
            room = None if cap is None else max(0, cap - self._queued_by_owner[row.owner])
            owners[row.owner] = Owner(row.owner, row.owner_weight or 1.0, row.owner_virtual_time or 0.0, room)
        return FairLine(shares, owners.values(), starvation_seconds=self._starvation_seconds)

    def _turns(self, model: str, line: FairLine, room: int) -> list[tuple[str, Served]]:
        """Choose a job for each turn, in serving order."""
        turns: list[tuple[str, Served]] = []
        # A batch may have fewer jobs than turns, since some wait for another try or for a duplicate: other batches get
        # the turns.
        while len(turns) < room and (served := line.take(room - len(turns))):
            by_batch: dict[str, list[Served]] = defaultdict(list)
            for each in served:
                by_batch[each.batch_id].append(each)
            jobs = {batch_id: iter(self._next_jobs(model, batch_id, its)) for batch_id, its in by_batch.items()}
            for each in served:
                job_id = next(jobs[each.batch_id], None)
                if job_id is None:
                    line.give_back(each)
                else:
                    turns.append((job_id, each))
        return turns

    def _next_jobs(self, model: str, batch_id: str, its: Sequence[Served]) -> list[str]:
        """Return a batch's next jobs for its turns, fewer if there are no more."""
        place, count = (model, batch_id), len(its)
        priority = max(each.priority for each in its)
        rows = self._read(place, count, after=self._reached[place])
        jobs = self._choose(place, rows, priority, count)
        if len(jobs) < count == len(rows) and self._ahead_left > 0:
            # Jobs that wait for duplicates, or for copies, must not block those behind them: read ahead, and resume
            # there in the next pass.
            most = self._ahead_left
            rows = self._read(place, most, after=max(self._reached[place], self._ahead.get(place, 0)))
            jobs += self._choose(place, rows, priority, count - len(jobs))
            self._ahead_left -= len(rows)
            at_the_end = len(rows) < most and (not rows or self._reached[place] == rows[-1].position)
            if at_the_end:
                self._ahead.pop(place, None)
            else:
                self._ahead[place] = self._reached[place]
        return jobs

    def _read(self, place: tuple[str, str], count: int, after: int) -> Sequence[sa.Row[Any]]:
        model, batch_id = place
        return self._session.execute(next_jobs(model, batch_id, count, after, self._limits.get(model, ()))).all()

    def _choose(self, place: tuple[str, str], rows: Sequence[sa.Row[Any]], priority: int, most: int) -> list[str]:
        chosen = self.works.choose(rows, place[0], priority, most)
        if chosen.last is not None:
            self._reached[place] = chosen.last
        return chosen.job_ids

    def _count_in_flight(self) -> None:
        for state in (JobState.QUEUED, JobState.RUNNING):
            rows = self._session.execute(
                sa.select(JobRow.model, JobRow.batch_id, BatchRow.priority, BatchRow.owner, sa.func.count())
                .join(BatchRow)
                .where(in_state(state))
                .group_by(JobRow.model, JobRow.batch_id, BatchRow.priority, BatchRow.owner)
            )
            for model, batch_id, priority, owner, count in rows:
                self._in_flight[batch_id] += count
                if state is JobState.QUEUED:
                    self._queued_by_kind[model, priority >= URGENT] += count
                    self._queued_by_owner[owner] += count


def _queue(session: Session, turns: Sequence[tuple[str, Served]]) -> dict[str, sa.Row[Any]]:
    """Queue these jobs, with their charges; returns those that were still pending, by id.

    A job whose batch would have starved keeps its high priority from now on, in the engine too.
    """
    by_priority: dict[int, list[tuple[str, Served]]] = defaultdict(list)
    for turn in turns:
        by_priority[turn[1].priority].append(turn)
    moved: dict[str, sa.Row[Any]] = {}
    for priority, its in by_priority.items():
        charges = sa.case({served.batch_id: served.seconds for _, served in its}, value=JobRow.batch_id)
        queue = Move(
            {JobState.PENDING: JobState.QUEUED},
            queued_at=now(),
            priority=priority,
            charged_seconds=sa.func.coalesce(JobRow.charged_seconds, 0.0) + charges,
        )
        rows = session.execute(
            queue.update.where(JobRow.id.in_([job_id for job_id, _ in its])).returning(
                JobRow.id, JobRow.spec, JobRow.position
            )
        )
        moved.update({row.id: row for row in rows})
    return moved


def _write_virtual_times(session: Session, line: FairLine, batch_ids: Iterable[str]) -> None:
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
        # The prompt comes early: Flower truncates long texts.
        shown=f"{_shortened(batch.name, 40)} {job.position}/{batch.total}: {_shortened(job.spec['prompt'], 80)} "
        f"(model {model})",
    )


def _shortened(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"

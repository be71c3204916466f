"""`JobStore`: the only writer of job state, and what can be asked about jobs.

Every move of a job is one statement that names the state it leaves, and a worker's also the attempt it holds:
whoever comes second matches no row and learns that it was too late.
"""

import logging
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.broker import Doorbell
from farm.db import BatchRow, Database, JobRow, WorkerRow, now, now_plus
from farm.errors import NotFound
from farm.records import BatchStatus, Beat, Claim, JobInfo, Pace, Picture, WorkerInfo, job_info
from farm.settings import Settings
from farm.spec import RenderSpec
from farm.states import ACTIVE, JobState
from farm.storage import slug

log = logging.getLogger(__name__)

_INSERT_CHUNK = 1000
_DISPATCH_LOCK = 0x66617264
_STALE = (JobRow.checkpoint_key.is_not(None), JobRow.finished_at.is_not(None))


def new_batch_id(name: str) -> str:
    """An id that reminds of the batch's name and is nobody else's."""
    alphabet = "23456789abcdefghjkmnpqrstuvwxyz"
    return "-".join((slug(name)[:30].strip("-") or "batch", "".join(secrets.choice(alphabet) for _ in range(8))))


class JobStore:
    """Jobs in SQL: submitted, dispatched, claimed, renewed, ended."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._lease_seconds = settings.lease_seconds
        self._max_tries = settings.max_tries
        self._max_lost_leases = settings.max_lost_leases

    # --- the producer ---------------------------------------------------------------------------------------

    def submit(self, name: str, owner: str, priority: int, specs: Iterable[RenderSpec]) -> str:
        """Write a batch and all its jobs in one transaction, as pending; returns the batch's id."""
        batch_id = new_batch_id(name)
        with self._db.write() as session:
            # Start where the backlog stands: neither behind a large batch that is waiting, nor ahead of it.
            start = session.scalar(sa.select(sa.func.min(JobRow.rank)).where(_in(JobState.PENDING))) or 0.0
            batch = BatchRow(id=batch_id, name=name, owner=owner, priority=priority, total=0)
            batch.created_at = now()
            session.add(batch)
            session.flush()
            total = 0
            for chunk in _chunks(specs, _INSERT_CHUNK):
                session.execute(
                    sa.insert(JobRow),
                    [
                        {
                            "id": f"{batch_id}-{index}",
                            "batch_id": batch_id,
                            "index": index,
                            "spec": spec.model_dump(mode="json"),
                            "model": spec.model,
                            "priority": priority,
                            "rank": start + index,
                        }
                        for index, spec in enumerate(chunk, total + 1)
                    ],
                )
                total += len(chunk)
            session.execute(sa.update(BatchRow).where(BatchRow.id == batch_id).values(total=total))
        log.info("submitted batch_id=%s name=%r jobs=%d", batch_id, name, total)
        return batch_id

    def cancel(self, *, batch_id: str | None = None, job_id: str | None = None) -> int:
        """Cancel what has not ended of a batch or a job; returns how many jobs that were.

        What waits is cancelled at once; what runs is marked, and its worker stops it and reports.
        """
        which = JobRow.batch_id == batch_id if batch_id is not None else JobRow.id == job_id
        running = _in(JobState.RUNNING)
        with self._db.write() as session:
            # One statement: between two, a job could step from the state of one into that of the other.
            changed = session.execute(
                sa.update(JobRow)
                .where(which, JobRow.state.in_(ACTIVE))
                .values(
                    cancel_requested=True,
                    state=sa.case((running, JobRow.state), else_=JobState.CANCELLED.value),
                    finished_at=sa.case((running, None), else_=now()),
                )
                .returning(JobRow.id)
            ).all()
        log.info("cancelled batch_id=%s job_id=%s jobs=%d", batch_id, job_id, len(changed))
        return len(changed)

    def want_preview(self, job_id: str, *, vae: bool, seconds: float = 30) -> bool:
        """Ask a job's worker to show how it gets on, for that many seconds; False if it has ended, or is not there.

        Who asks last decides whether it is decoded by the VAE. A job that waits remembers the wish.
        """
        with self._db.write() as session:
            row = session.execute(
                sa.update(JobRow)
                .where(JobRow.id == job_id, JobRow.state.in_(ACTIVE))
                .values(preview_until=now_plus(sa.literal(float(seconds))), preview_vae=vae)
                .returning(JobRow.id)
            ).one_or_none()
        return row is not None

    # --- the dispatcher -------------------------------------------------------------------------------------

    def enqueue(self, window: int) -> list[Doorbell]:
        """Move jobs from the backlog to queued, in serving order, until each model has a window of them there.

        The caller publishes what comes back, in this order, after this has committed.
        """
        bells: list[Doorbell] = []
        with self._db.write() as session:
            self._db.exclusive(session, _DISPATCH_LOCK)
            for model in _models(session, JobState.PENDING):
                lying = session.scalar(
                    sa.select(sa.func.count()).select_from(JobRow).where(_in(JobState.QUEUED), JobRow.model == model)
                )
                room = window - (lying or 0)
                if room > 0:
                    bells += self._enqueue_model(session, model, room)
        return bells

    def _enqueue_model(self, session: Session, model: str, room: int) -> list[Doorbell]:
        line = (JobRow.priority.desc(), JobRow.rank, JobRow.id)
        ids = session.scalars(
            sa.select(JobRow.id).where(_in(JobState.PENDING), JobRow.model == model).order_by(*line).limit(room)
        ).all()
        moved = session.scalars(
            sa.update(JobRow)
            .where(JobRow.id.in_(ids), _in(JobState.PENDING))
            .values(state=JobState.QUEUED.value, queued_at=now())
            .returning(JobRow.id)
        ).all()
        rows = session.execute(
            sa.select(
                JobRow.id, JobRow.spec, JobRow.index.label("place"), JobRow.priority, BatchRow.name, BatchRow.total
            )
            .join(BatchRow)
            .where(JobRow.id.in_(moved))
            .order_by(*line)
        )
        return [
            Doorbell(
                job_id=row.id,
                model=model,
                priority=row.priority,
                # The prompt early: Flower's page cuts a long text short.
                shown=f"{_shortened(row.name, 40)} {row.place}/{row.total}: {_shortened(row.spec['prompt'], 80)} "
                f"(model {model})",
            )
            for row in rows
        ]

    def queued_models(self) -> list[str]:
        """The models that have queued jobs."""
        with self._db.read() as session:
            return list(_models(session, JobState.QUEUED))

    def queued(self, model: str) -> list[str]:
        """The ids of a model's queued jobs; at most a window of them."""
        with self._db.read() as session:
            return list(session.scalars(sa.select(JobRow.id).where(_in(JobState.QUEUED), JobRow.model == model)))

    def unqueue(self, job_ids: Sequence[str]) -> int:
        """Put queued jobs back into the backlog: their messages were not published, or are gone; returns how many."""
        with self._db.write() as session:
            moved = session.execute(
                sa.update(JobRow)
                .where(_in(JobState.QUEUED), JobRow.id.in_(job_ids))
                .values(state=JobState.PENDING.value, queued_at=None)
                .returning(JobRow.id)
            ).all()
        return len(moved)

    def expire_leases(self) -> int:
        """Take running jobs from workers whose lease ran out; returns how many.

        They go back to the backlog, or to cancelled if somebody asked for it, or to failed if they have now lost
        their worker so often that they may be what kills it.
        """
        return self._lose_leases(JobRow.lease_until < now())

    def _lose_leases(self, *which: sa.ColumnElement[bool]) -> int:
        poison = JobRow.lost_leases + 1 >= self._max_lost_leases
        with self._db.write() as session:
            lost = session.execute(
                sa.update(JobRow)
                .where(_in(JobState.RUNNING), *which)
                .values(
                    lost_leases=JobRow.lost_leases + 1,
                    **_leave_running(
                        sa.case((poison, JobState.FAILED.value), else_=JobState.PENDING.value),
                        sa.case(
                            (
                                poison,
                                f"set aside: its worker was lost {self._max_lost_leases} times while rendering it",
                            ),
                            else_=JobRow.error,
                        ),
                    ),
                )
                .returning(JobRow.id, JobRow.attempt, JobRow.state)
            ).all()
        for row in lost:
            log.warning("lease lost job_id=%s attempt=%d now=%s", row.id, row.attempt, row.state)
        return len(lost)

    def stale_checkpoints(self, limit: int = 100) -> list[tuple[str, str]]:
        """Id and checkpoint key of jobs that ended and left one, those that ended first before the others."""
        with self._db.read() as session:
            return [
                (job_id, key)
                for job_id, key in session.execute(
                    sa.select(JobRow.id, JobRow.checkpoint_key).where(*_STALE).order_by(JobRow.finished_at).limit(limit)
                )
                if key
            ]

    def forget_checkpoints(self, job_ids: Sequence[str]) -> None:
        """Record that the checkpoints of these jobs, which have ended, are deleted."""
        with self._db.write() as session:
            session.execute(sa.update(JobRow).where(*_STALE, JobRow.id.in_(job_ids)).values(checkpoint_key=None))

    # --- the worker -----------------------------------------------------------------------------------------

    def claim(self, job_id: str, worker: str) -> Claim | None:
        """Take a queued job under a new lease; None if it is not queued (a duplicate message, or cancelled)."""
        with self._db.write() as session:
            row = session.execute(
                sa.update(JobRow)
                .where(JobRow.id == job_id, _in(JobState.QUEUED))
                .values(
                    state=JobState.RUNNING.value,
                    attempt=JobRow.attempt + 1,
                    worker=worker,
                    lease_until=now_plus(sa.literal(self._lease_seconds)),
                    started_at=now(),
                    steps_done=0,
                )
                .returning(
                    JobRow.attempt,
                    JobRow.spec,
                    JobRow.batch_id,
                    JobRow.index.label("place"),
                    JobRow.priority,
                    JobRow.checkpoint_key,
                )
            ).one_or_none()
            if row is None:
                return None
            batch = session.get_one(BatchRow, row.batch_id)
            claim = Claim(
                job_id=job_id,
                attempt=row.attempt,
                spec=RenderSpec.model_validate(row.spec),
                batch_id=row.batch_id,
                batch_name=batch.name,
                index=row.place,
                total=batch.total,
                priority=row.priority,
                checkpoint_key=row.checkpoint_key,
            )
        log.info("claimed job_id=%s attempt=%d worker=%s", job_id, claim.attempt, worker)
        return claim

    def beat(self, worker: str, paces: Mapping[tuple[str, int], Pace]) -> Beat:
        """Renew the leases a worker holds, keyed by job id and attempt, and write how far each render is.

        Also the worker's sign of life. One statement for all its jobs.
        """
        held = {job_id for job_id, _ in paces}
        with self._db.write() as session:
            session.execute(sa.update(WorkerRow).where(WorkerRow.name == worker).values(seen_at=now()))
            rows = (
                session.execute(
                    sa.update(JobRow)
                    .where(_in(JobState.RUNNING), sa.tuple_(JobRow.id, JobRow.attempt).in_(list(paces)))
                    .values(
                        lease_until=now_plus(sa.literal(self._lease_seconds)),
                        steps_done=sa.case(
                            {job_id: pace.steps_done for (job_id, _), pace in paces.items()}, value=JobRow.id
                        ),
                        seconds_per_step=sa.case(
                            {
                                # PostgreSQL takes a NULL without a type for text.
                                job_id: sa.cast(pace.seconds_per_step, sa.Double())
                                for (job_id, _), pace in paces.items()
                            },
                            value=JobRow.id,
                        ),
                    )
                    .returning(
                        JobRow.id,
                        JobRow.cancel_requested,
                        (JobRow.preview_until > now()).label("watched"),
                        JobRow.preview_vae,
                    )
                ).all()
                if paces
                else []
            )
        return Beat(
            cancelled=frozenset(row.id for row in rows if row.cancel_requested),
            lost=frozenset(held - {row.id for row in rows}),
            previews={row.id: row.preview_vae for row in rows if row.watched},
        )

    def checkpointed(self, claim: Claim, key: str) -> bool:
        """Record the object that a later attempt can go on from; False if the claim no longer holds."""
        with self._db.write() as session:
            row = session.execute(
                sa.update(JobRow).where(*_holds(claim)).values(checkpoint_key=key).returning(JobRow.id)
            ).one_or_none()
        return row is not None

    def succeed(self, claim: Claim, picture: Picture) -> bool:
        """Record the picture of a claimed job, and forget its checkpoint, whose object the worker deletes.

        False if the claim no longer holds.
        """
        return self._end(
            claim,
            state=JobState.SUCCEEDED.value,
            finished_at=now(),
            lease_until=None,
            error=None,
            checkpoint_key=None,
            steps_done=claim.spec.num_inference_steps,
            image_key=picture.key,
            image_sha256=picture.sha256,
            image_bytes=picture.bytes,
            width=picture.width,
            height=picture.height,
            model_sha256=picture.model_sha256,
            render_seconds=picture.render_seconds,
            warnings=list(picture.warnings),
        )

    def fail(self, claim: Claim, error: str, *, retryable: bool) -> bool:
        """Record a claimed job's error: back to the backlog while it has tries left and another may help.

        The next try starts afresh, since what was checkpointed may be what went wrong: the worker deletes its
        checkpoint before it calls this. False if the claim no longer holds.
        """
        again = (JobRow.tries + 1 < self._max_tries) if retryable else sa.false()
        state = sa.case((again, JobState.PENDING.value), else_=JobState.FAILED.value)
        left = _leave_running(state, sa.literal(error))
        kept = sa.case((left["state"] == JobState.PENDING.value, None), else_=JobRow.checkpoint_key)
        return self._end(claim, tries=JobRow.tries + 1, checkpoint_key=kept, **left)

    def hand_back(self, claim: Claim) -> bool:
        """Give a claimed job back to the backlog, unrendered, at no cost; False if the claim no longer holds."""
        return self._end(claim, **_leave_running(sa.literal(JobState.PENDING.value), JobRow.error))

    def stopped(self, claim: Claim) -> bool:
        """Record that a claimed job is no longer rendered because it was cancelled; False if the claim is void."""
        return self._end(claim, **_leave_running(sa.literal(JobState.CANCELLED.value), JobRow.error))

    def _end(self, claim: Claim, **values: Any) -> bool:
        with self._db.write() as session:
            row = session.execute(
                sa.update(JobRow).where(*_holds(claim)).values(**values).returning(JobRow.state, JobRow.worker)
            ).one_or_none()
        if row is None:
            log.warning("too late job_id=%s attempt=%d", claim.job_id, claim.attempt)
            return False
        log.info("ended job_id=%s attempt=%d now=%s", claim.job_id, claim.attempt, row.state)
        return True

    def introduce(self, worker: WorkerInfo) -> None:
        """Record a worker that has just started, and take back what an earlier one of its name had left."""
        values = {
            "device": worker.device,
            "dtype": worker.dtype,
            "slots": worker.slots,
            "version": worker.version,
            "models": [dict(model) for model in worker.models],
            "started_at": now(),
            "seen_at": now(),
        }
        with self._db.write() as session:
            session.execute(sa.delete(WorkerRow).where(WorkerRow.name == worker.name))
            session.execute(sa.insert(WorkerRow).values(name=worker.name, **values))
        self._lose_leases(JobRow.worker == worker.name)

    def leave(self, worker: str) -> None:
        """Forget a worker that has stopped in good order."""
        with self._db.write() as session:
            session.execute(sa.delete(WorkerRow).where(WorkerRow.name == worker))

    # --- questions ------------------------------------------------------------------------------------------

    def batch(self, name_or_id: str) -> BatchStatus:
        """A batch by its id, or the newest of that name; raises `NotFound`."""
        with self._db.read() as session:
            row = (
                session.get(BatchRow, name_or_id)
                or session.scalars(
                    sa.select(BatchRow).where(BatchRow.name == name_or_id).order_by(BatchRow.created_at.desc()).limit(1)
                ).one_or_none()
            )
            if row is None:
                raise NotFound(f"there is no batch {name_or_id!r}; `farm status` lists them")
            return self._status(session, row)

    def batches(self, limit: int = 20, *, active_only: bool = False) -> list[BatchStatus]:
        """The newest batches, newest first."""
        query = sa.select(BatchRow).order_by(BatchRow.created_at.desc(), BatchRow.id).limit(limit)
        if active_only:
            query = query.where(
                sa.exists().where(JobRow.batch_id == BatchRow.id, JobRow.state.in_(ACTIVE)).correlate(BatchRow)
            )
        with self._db.read() as session:
            return [self._status(session, row) for row in session.scalars(query).all()]

    def _status(self, session: Session, row: BatchRow) -> BatchStatus:
        found = session.execute(
            sa.select(JobRow.state, sa.func.count(), sa.func.max(JobRow.finished_at))
            .where(JobRow.batch_id == row.id)
            .group_by(JobRow.state)
        ).all()
        counts = {JobState(state): n for state, n, _ in found}
        ended = not any(counts.get(state) for state in ACTIVE)
        return BatchStatus(
            id=row.id,
            name=row.name,
            owner=row.owner,
            priority=row.priority,
            total=row.total,
            created_at=row.created_at,
            counts={state: counts.get(state, 0) for state in JobState},
            finished_at=max((at for _, _, at in found if at), default=None) if ended else None,
        )

    def job(self, job_id: str) -> JobInfo:
        """A job by its id; raises `NotFound`."""
        with self._db.read() as session:
            row = session.get(JobRow, job_id)
            if row is None:
                raise NotFound(f"there is no job {job_id!r}")
            return job_info(row)

    def jobs(
        self, batch_id: str, *, after: int = 0, limit: int = 1000, states: Sequence[JobState] = ()
    ) -> list[JobInfo]:
        """A batch's jobs in their order, from the one after that index."""
        query = sa.select(JobRow).where(JobRow.batch_id == batch_id, JobRow.index > after)
        if states:
            query = query.where(JobRow.state.in_(states))
        with self._db.read() as session:
            return [job_info(row) for row in session.scalars(query.order_by(JobRow.index).limit(limit))]

    def finished(self, batch_id: str, since: datetime | None = None) -> list[JobInfo]:
        """A batch's jobs that have ended, at or after that time, in the order they did."""
        query = sa.select(JobRow).where(JobRow.batch_id == batch_id, JobRow.finished_at.is_not(None))
        if since is not None:
            query = query.where(JobRow.finished_at >= since)
        with self._db.read() as session:
            return [job_info(row) for row in session.scalars(query.order_by(JobRow.finished_at, JobRow.index))]

    def running(self, batch_id: str, limit: int = 1000) -> list[JobInfo]:
        """The jobs of a batch that render now."""
        return self.jobs(batch_id, states=(JobState.RUNNING,), limit=limit)

    def workers(self) -> list[WorkerInfo]:
        """Every worker that has not said goodbye, by name."""
        alive = WorkerRow.seen_at > now_plus(sa.literal(-self._lease_seconds))
        with self._db.read() as session:
            return [
                WorkerInfo(
                    name=row.name,
                    device=row.device,
                    dtype=row.dtype,
                    slots=row.slots,
                    version=row.version,
                    models=tuple(row.models),
                    started_at=row.started_at,
                    alive=bool(lives),
                )
                for row, lives in session.execute(sa.select(WorkerRow, alive).order_by(WorkerRow.name))
            ]

    def waiting_by_model(self) -> dict[str, int]:
        """How many jobs of each model wait, in the backlog or in Redis."""
        states = (JobState.PENDING, JobState.QUEUED)
        with self._db.read() as session:
            waiting: dict[str, int] = {}
            for state in states:
                for model, count in session.execute(
                    sa.select(JobRow.model, sa.func.count()).where(_in(state)).group_by(JobRow.model)
                ):
                    waiting[model] = waiting.get(model, 0) + count
            return waiting


def _in(state: JobState) -> sa.ColumnElement[bool]:
    # A literal, not a parameter: neither database uses a partial index for a value it can't see when it plans.
    return JobRow.state == sa.literal_column(f"'{state.value}'")


def _holds(claim: Claim) -> tuple[sa.ColumnElement[bool], ...]:
    return JobRow.id == claim.job_id, JobRow.attempt == claim.attempt, _in(JobState.RUNNING)


def _leave_running(state: sa.ColumnElement[str], error: Any) -> dict[str, Any]:
    """What changes when a running job is rendered no longer: a wish to cancel it comes first."""
    state = sa.case((JobRow.cancel_requested, JobState.CANCELLED.value), else_=state)
    return {
        "state": state,
        "error": error,
        "worker": None,
        "lease_until": None,
        "queued_at": None,
        "steps_done": 0,
        "finished_at": sa.case((state == JobState.PENDING.value, None), else_=now()),
    }


def _models(session: Session, state: JobState) -> Iterator[str]:
    # From one model to the next over the partial index: as many look-ups as models, however many jobs there are.
    last = ""
    while True:
        found = session.scalar(
            sa.select(JobRow.model).where(_in(state), JobRow.model > last).order_by(JobRow.model).limit(1)
        )
        if found is None:
            return
        yield found
        last = found


def _shortened(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _chunks(specs: Iterable[RenderSpec], size: int) -> Iterator[list[RenderSpec]]:
    iterator = iter(specs)
    while chunk := list(islice(iterator, size)):
        yield chunk

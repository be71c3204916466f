"""`JobStore`: the only writer of job state.

Every move of a job is one statement that names the state it leaves, and a worker's also the attempt it holds:
whoever comes second matches no row and learns that it was too late.
"""

import logging
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.broker import Doorbell
from farm.db import BatchRow, Database, JobRow, WorkerRow, now, now_plus
from farm.queries import STALE, JobQueries, in_state, models_in
from farm.records import Beat, Claim, Pace, Picture, WorkerInfo
from farm.settings import Settings
from farm.spec import RenderSpec
from farm.states import ACTIVE, JobState
from farm.storage import slug

log = logging.getLogger(__name__)

_INSERT_CHUNK = 1000
_DISPATCH_LOCK = 0x66617264


def new_batch_id(name: str) -> str:
    """An id that reminds of the batch's name and is nobody else's."""
    alphabet = "23456789abcdefghjkmnpqrstuvwxyz"
    return "-".join((slug(name)[:30].strip("-") or "batch", "".join(secrets.choice(alphabet) for _ in range(8))))


class JobStore(JobQueries):
    """Jobs in SQL: submitted, dispatched, claimed, renewed, ended."""

    def __init__(self, db: Database, settings: Settings) -> None:
        super().__init__(db, settings)
        self._max_tries = settings.max_tries
        self._max_lost_leases = settings.max_lost_leases

    # --- the producer ---------------------------------------------------------------------------------------

    def submit(self, name: str, owner: str, priority: int, specs: Iterable[RenderSpec]) -> str:
        """Write a batch and all its jobs in one transaction, as pending; returns the batch's id."""
        batch_id = new_batch_id(name)
        with self._db.write() as session:
            # Start where the backlog stands: neither behind a large batch that is waiting, nor ahead of it.
            start = session.scalar(sa.select(sa.func.min(JobRow.rank)).where(in_state(JobState.PENDING))) or 0.0
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
        running = in_state(JobState.RUNNING)
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
            for model in models_in(session, JobState.PENDING):
                lying = session.scalar(
                    sa.select(sa.func.count())
                    .select_from(JobRow)
                    .where(in_state(JobState.QUEUED), JobRow.model == model)
                )
                room = window - (lying or 0)
                if room > 0:
                    bells += self._enqueue_model(session, model, room)
        return bells

    def _enqueue_model(self, session: Session, model: str, room: int) -> list[Doorbell]:
        line = (JobRow.priority.desc(), JobRow.rank, JobRow.id)
        ids = session.scalars(
            sa.select(JobRow.id).where(in_state(JobState.PENDING), JobRow.model == model).order_by(*line).limit(room)
        ).all()
        moved = session.scalars(
            sa.update(JobRow)
            .where(JobRow.id.in_(ids), in_state(JobState.PENDING))
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

    def unqueue(self, job_ids: Sequence[str]) -> int:
        """Put queued jobs back into the backlog: their messages were not published, or are gone; returns how many."""
        with self._db.write() as session:
            moved = session.execute(
                sa.update(JobRow)
                .where(in_state(JobState.QUEUED), JobRow.id.in_(job_ids))
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
                .where(in_state(JobState.RUNNING), *which)
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

    def forget_checkpoints(self, job_ids: Sequence[str]) -> None:
        """Record that the checkpoints of these jobs, which have ended, are deleted."""
        with self._db.write() as session:
            session.execute(sa.update(JobRow).where(*STALE, JobRow.id.in_(job_ids)).values(checkpoint_key=None))

    # --- the worker -----------------------------------------------------------------------------------------

    def claim(self, job_id: str, worker: str) -> Claim | None:
        """Take a queued job under a new lease; None if it is not queued (a duplicate message, or cancelled)."""
        with self._db.write() as session:
            row = session.execute(
                sa.update(JobRow)
                .where(JobRow.id == job_id, in_state(JobState.QUEUED))
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
                    .where(in_state(JobState.RUNNING), sa.tuple_(JobRow.id, JobRow.attempt).in_(list(paces)))
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


def _holds(claim: Claim) -> tuple[sa.ColumnElement[bool], ...]:
    return JobRow.id == claim.job_id, JobRow.attempt == claim.attempt, in_state(JobState.RUNNING)


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


def _shortened(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _chunks(specs: Iterable[RenderSpec], size: int) -> Iterator[list[RenderSpec]]:
    iterator = iter(specs)
    while chunk := list(islice(iterator, size)):
        yield chunk

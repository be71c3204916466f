"""The job store agrees with a model, a plain dict of jobs, after any sequence of operations, on every database.

A short form runs with all tests; `pytest --hypothesis-profile long` runs many more examples.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from farm.errors import ErrorClass
from farm.jobs.conditions import in_state
from farm.jobs.database import Database, now_plus
from farm.jobs.records import Claim, Pace, Picture, WorkerInfo
from farm.jobs.schema import AttemptRow, BatchRow, JobCountRow, JobRow, OwnerRow
from farm.jobs.served_models import ServedModel
from farm.jobs.states import TRANSITIONS, JobState
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.spec import RenderSpec

MAX_TRIES, MAX_LOST = 3, 3
PICTURE = Picture("key", "f" * 64, 123, 64, 64, "e" * 64, 1.5)
WORKERS = ("w1@host", "w2@host")
OWNERS = ("ann", "ben")
LIVE = (JobState.PENDING, JobState.QUEUED, JobState.RUNNING)


@dataclass
class Known:
    """The model's record of a job."""

    batch_id: str
    owner: str
    state: JobState = JobState.PENDING
    attempt: int = 0
    tries: int = 0
    lost: int = 0
    worker: str | None = None
    avoid: str | None = None
    cancel: bool = False
    paused: bool = False
    outcomes: list[str] = field(default_factory=list)
    ended: list[tuple[str, JobState]] = field(default_factory=list)
    """The endings that the log must report: the attempt, if one ended, and the new state of the job."""

    def ends(self, outcome: str, state: JobState) -> None:
        """Record the end of the running attempt; a requested cancellation overrides any state but success."""
        cancelled = self.cancel and state is not JobState.SUCCEEDED
        self.outcomes.append("cancelled" if cancelled and outcome != "lost" else outcome)
        self.state = JobState.CANCELLED if cancelled else state
        self.ended.append((str(self.attempt), self.state))


class Farm(RuleBasedStateMachine):
    """Users, a dispatcher and two workers, whose operations come in any order."""

    database: Database
    lines: list[str]
    """The log lines that report endings."""
    batches = Bundle("batches")
    claims = Bundle("claims")

    @initialize()
    def clean(self) -> None:
        self.store = JobStore.over(
            self.database,
            Settings(
                database_url="",
                broker_url="",
                s3_bucket="",
                retry_seconds=0,
                lease_seconds=600,
                max_tries=MAX_TRIES,
                max_lost_leases=MAX_LOST,
            ),
        )
        with self.database.write() as session:
            session.execute(sa.delete(BatchRow))
            session.execute(sa.delete(OwnerRow))
        for name in WORKERS:
            model = ServedModel("tiny", sha256="e" * 64)
            self.store.workers.register(WorkerInfo(name, "cpu", "float32", 8, "0", (model,)))
        self.lines.clear()
        self.jobs: dict[str, Known] = {}
        self.seen: dict[str, JobState] = {}
        self.paused: set[str] = set()

    # --- users

    @rule(target=batches, count=st.integers(1, 3), owner=st.sampled_from(OWNERS))
    def submit(self, count: int, owner: str) -> str:
        specs = (RenderSpec(prompt=f"p{n}", num_inference_steps=5) for n in range(count))
        batch_id = str(self.store.submissions.submit("batch", owner, 50, specs))
        for index in range(1, count + 1):
            self.jobs[f"{batch_id}-{index}"] = Known(batch_id, owner)
        return batch_id

    def which(self, batch_id: str, kind: str) -> tuple[dict[str, str], list[Known]]:
        owner = self.jobs[f"{batch_id}-1"].owner
        if kind == "job":
            return {"job_id": f"{batch_id}-1"}, [self.jobs[f"{batch_id}-1"]]
        if kind == "owner":
            return {"owner": owner}, [job for job in self.jobs.values() if job.owner == owner]
        return {"batch_id": batch_id}, [job for job in self.jobs.values() if job.batch_id == batch_id]

    kinds = st.sampled_from(["job", "batch", "owner"])

    @rule(batch_id=batches, kind=kinds)
    def cancel(self, batch_id: str, kind: str) -> None:
        which, jobs = self.which(batch_id, kind)
        active = [job for job in jobs if job.state in LIVE]
        assert self.store.steering.cancel(**which) == len(active)
        for job in active:
            job.cancel = True
            if job.state is not JobState.RUNNING:
                job.state = JobState.CANCELLED
                job.ended.append(("", job.state))

    @rule(batch_id=batches, kind=kinds, paused=st.booleans())
    def pause_or_resume(self, batch_id: str, kind: str, paused: bool) -> None:
        which, jobs = self.which(batch_id, kind)
        active = [job for job in jobs if job.state in LIVE]
        assert (self.store.steering.pause if paused else self.store.steering.resume)(**which) == len(active)
        if kind == "job":
            for job in active:
                job.paused = paused
        else:
            (name,) = which.values()
            (self.paused.add if paused else self.paused.discard)(name)
        if paused:
            for job in active:
                if job.state is JobState.QUEUED:
                    job.state = JobState.PENDING

    def is_paused(self, job: Known) -> bool:
        return job.paused or bool(self.paused & {job.batch_id, job.owner})

    @rule(batch_id=batches, kind=kinds)
    def retry(self, batch_id: str, kind: str) -> None:
        which, jobs = self.which(batch_id, kind)
        failed = [job for job in jobs if job.state is JobState.FAILED]
        assert self.store.steering.retry(**which) == len(failed)
        for job in failed:
            job.state, job.tries, job.lost, job.avoid = JobState.PENDING, 0, 0, None

    # --- the dispatcher

    @rule(window=st.integers(1, 6))
    def fill(self, window: int) -> None:
        lying = sum(job.state is JobState.QUEUED for job in self.jobs.values())
        bells = self.store.backlog.enqueue(window).queued
        assert len(bells) <= max(0, window - lying)
        for bell in bells:
            job = self.jobs[bell.job_id]
            assert job.state is JobState.PENDING
            assert not self.is_paused(job)
            job.state = JobState.QUEUED

    @rule()
    def lose_messages(self) -> None:
        queued = [job_id for job_id, job in self.jobs.items() if job.state is JobState.QUEUED]
        assert self.store.backlog.unqueue(list(self.jobs)) == len(queued)
        for job_id in queued:
            self.jobs[job_id].state = JobState.PENDING

    @rule(worker=st.sampled_from(WORKERS))
    def lose_a_worker(self, worker: str) -> None:
        lost = [job for job in self.jobs.values() if job.state is JobState.RUNNING and job.worker == worker]
        with self.database.write() as session:
            session.execute(
                sa.update(JobRow)
                .where(JobRow.worker == worker, in_state(JobState.RUNNING))
                .values(lease_until=now_plus(sa.literal(-60.0)))
            )
        assert self.store.leases.expire() == len(lost)
        for job in lost:
            job.lost += 1
            job.ends("lost", JobState.FAILED if job.lost >= MAX_LOST else JobState.PENDING)

    # --- workers

    @precondition(lambda self: self.jobs)
    @rule(target=claims, data=st.data(), worker=st.sampled_from(WORKERS))
    def claim(self, data: st.DataObject, worker: str) -> object:
        queued = [job_id for job_id, job in self.jobs.items() if job.state is JobState.QUEUED]
        job_id = data.draw(st.sampled_from(queued or list(self.jobs)))
        job, claim = self.jobs[job_id], self.store.leases.claim(job_id, worker)
        if job.state is not JobState.QUEUED:
            assert claim is None
            return multiple()
        if job.avoid == worker:
            assert claim is None
            job.state = JobState.PENDING
            return multiple()
        assert claim is not None
        job.state, job.worker, job.attempt = JobState.RUNNING, worker, job.attempt + 1
        assert (claim.attempt, claim.tries) == (job.attempt, job.tries)
        return claim

    def holds(self, claim: Claim) -> bool:
        job = self.jobs[claim.job_id]
        return job.state is JobState.RUNNING and job.attempt == claim.attempt

    @rule(claim=claims)
    def beat(self, claim: Claim) -> None:
        job = self.jobs[claim.job_id]
        beat = self.store.leases.beat("whoever", {(claim.job_id, claim.attempt): Pace(1, 0.1)})
        holds = self.holds(claim)
        assert (claim.job_id in beat.lost) == (not holds)
        assert (claim.job_id in beat.cancelled) == (holds and job.cancel)
        assert (claim.job_id in beat.paused) == (holds and self.is_paused(job))

    @rule(claim=claims)
    def succeed(self, claim: Claim) -> None:
        holds, job = self.holds(claim), self.jobs[claim.job_id]
        already = job.state is JobState.SUCCEEDED and job.attempt == claim.attempt  # its answer may have been lost
        assert self.store.attempts.succeed(claim, PICTURE) == (holds or already)
        if holds:
            job.ends("succeeded", JobState.SUCCEEDED)

    @rule(claim=claims, error_class=st.sampled_from(list(ErrorClass)))
    def fail(self, claim: Claim, error_class: ErrorClass) -> None:
        holds, job = self.holds(claim), self.jobs[claim.job_id]
        assert self.store.attempts.fail(claim, "why", error_class) == holds
        if holds:
            job.tries += 1
            again = error_class.retryable and job.tries < MAX_TRIES
            if error_class is ErrorClass.OUT_OF_MEMORY:
                job.avoid = job.worker
            job.ends("retried" if again else "failed", JobState.PENDING if again else JobState.FAILED)

    @rule(claim=claims)
    def hand_back(self, claim: Claim) -> None:
        holds, job = self.holds(claim), self.jobs[claim.job_id]
        assert self.store.attempts.hand_back(claim) == holds
        if holds:
            job.ends("handed_back", JobState.PENDING)

    @rule(claim=claims)
    def stop(self, claim: Claim) -> None:
        job = self.jobs[claim.job_id]
        holds = self.holds(claim)
        if holds and not job.cancel:
            return  # a worker reports this only after a cancellation
        assert self.store.attempts.stopped(claim) == holds
        if holds:
            job.ends("cancelled", JobState.CANCELLED)

    # --- invariants

    @invariant()
    def the_store_says_what_the_model_says(self) -> None:
        with self.database.read() as session:
            rows = {row.id: row for row in session.scalars(sa.select(JobRow))}
            attempts: dict[str, list[str]] = {job_id: [] for job_id in rows}
            for ended in session.scalars(sa.select(AttemptRow).order_by(AttemptRow.job_id, AttemptRow.attempt)):
                attempts[ended.job_id].append(ended.outcome)
                assert ended.attempt == len(attempts[ended.job_id])
            counts: Counter[tuple[str, str]] = Counter()
            for count in session.scalars(sa.select(JobCountRow)):
                counts[count.batch_id, count.state] += count.n
        assert rows.keys() == self.jobs.keys()
        for job_id, job in self.jobs.items():
            row = rows[job_id]
            found = (row.state, row.attempt, row.tries, row.lost_leases, row.paused, row.avoid_worker)
            assert found == (job.state, job.attempt, job.tries, job.lost, job.paused, job.avoid), job_id
            assert attempts[job_id] == job.outcomes
            assert len(job.outcomes) == job.attempt - (job.state is JobState.RUNNING)
            assert (row.lease_until is not None) == (job.state is JobState.RUNNING)
            assert (row.finished_at is not None) == job.state.terminal
            before = self.seen.get(job_id, job.state)
            assert before is job.state or job.state in TRANSITIONS[before]
            self.seen[job_id] = job.state
        logged: dict[str, list[tuple[str, JobState]]] = {job_id: [] for job_id in self.jobs}
        for line in self.lines:
            if told := _ENDED.fullmatch(line):
                logged[told["job_id"]].append((told["attempt"] or "", JobState(told["state"])))
        assert logged == {job_id: job.ended for job_id, job in self.jobs.items()}
        there = Counter((job.batch_id, job.state.value) for job in self.jobs.values())
        assert {key: n for key, n in counts.items() if n} == there

    def teardown(self) -> None:
        """No job is lost: once pauses end and leases expire, every job can be rendered to its end."""
        if not hasattr(self, "jobs"):
            return
        for name in self.paused:
            self.store.steering.resume(**({"owner": name} if name in OWNERS else {"batch_id": name}))
        for job_id, job in self.jobs.items():
            if job.paused:
                self.store.steering.resume(job_id=job_id)
        for worker in WORKERS:
            self.lose_a_worker(worker)
        self.lose_messages()
        for turn in range(2 * len(self.jobs) + 1):
            for bell in self.store.backlog.enqueue(6).queued:
                # A worker that the job avoids puts it back into the backlog, so each worker tries first in turn.
                for worker in WORKERS[:: -1 if turn % 2 else 1]:
                    if claim := self.store.leases.claim(bell.job_id, worker):
                        assert self.store.attempts.succeed(claim, PICTURE)
                        break
        with self.database.read() as session:
            assert not session.scalars(sa.select(JobRow.id).where(JobRow.state.in_(LIVE))).all()


_ENDED = re.compile(r"ended job_id=(?P<job_id>\S+)(?: attempt=(?P<attempt>\d+))? now=(?P<state>\w+)")


@contextmanager
def logged_lines() -> Iterator[list[str]]:
    """Yield the list of lines that the transition log writes."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("farm.jobs.transitions")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def test_the_store_does_what_a_plain_dict_says(database: Database) -> None:
    with logged_lines() as lines:
        check(database, lines)


def check(database: Database, lines: list[str]) -> None:
    machine = type("FarmOnThis", (Farm,), {"database": database, "lines": lines})
    is_long = settings.default is not None and settings.default.max_examples >= 1000
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=500 if is_long else 12,
            stateful_step_count=100 if is_long else 40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

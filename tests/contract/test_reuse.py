"""Reuse of identical work on every database: which jobs wait for a duplicate, which get a copy, and what that costs."""

import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from farm.errors import ErrorClass
from farm.jobs import backlog, backlog_pass, reuse
from farm.jobs.database import Database
from farm.jobs.leadership import Leadership
from farm.jobs.records import Claim, Picture, WorkerInfo
from farm.jobs.reuse import Copying
from farm.jobs.schema import BatchRow, JobRow, WorkerRow
from farm.jobs.served_models import ServedModel
from farm.jobs.states import JobState, Outcome
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.spec import RenderSpec
from tests.query_plan import plan

WEIGHTS, OTHER = "e" * 64, "d" * 64
PICTURE = Picture("b/1.png", "f" * 64, 123, 64, 64, WEIGHTS, 1.5, ("cut at 77 tokens",), 0.75)
WORKER = WorkerInfo("w1@host", "cpu", "float32", 8, "0", (ServedModel("tiny", sha256=WEIGHTS),))
SPEC = RenderSpec(prompt="a boat", seed=1)


@pytest.fixture
def store(database: Database) -> JobStore:
    """A store with a registered worker and a leading dispatcher."""
    Leadership(database, "dispatcher", lease_seconds=600).keep()
    store = JobStore.over(database, Settings(database_url="", broker_url="", s3_bucket="", retry_seconds=0))
    store.workers.register(WORKER)
    return store


def submit(store: JobStore, *specs: RenderSpec, priority: int = 50, **options: bool) -> str:
    return store.submissions.submit("batch", "me", priority, specs or [SPEC], **options)


def passed(store: JobStore, most: int = 100) -> tuple[list[str], dict[str, str]]:
    """Run a pass; return the jobs it queued, and the copies it wants as a mapping of job to source."""
    found = store.backlog.enqueue(most, copy=True)
    return [bell.job_id for bell in found.queued], dict(found.copies)


def claimed(store: JobStore, job_id: str) -> Claim:
    claim = store.leases.claim(job_id, WORKER.name)
    assert claim is not None
    return claim


def rendered(store: JobStore, job_id: str, picture: Picture = PICTURE) -> str:
    assert store.attempts.succeed(claimed(store, job_id), replace(picture, key=f"{job_id}.png"))
    return job_id


def done(store: JobStore, spec: RenderSpec = SPEC, picture: Picture = PICTURE) -> str:
    """Render a job and return its id."""
    (job_id,), _ = passed(store) if submit(store, spec) else ([], {})
    return rendered(store, job_id, picture)


def copied(store: JobStore, copies: dict[str, str]) -> list[Copying]:
    """Record copies without copying objects; return those that came too late."""
    return store.reuse.record_copies(store.reuse.begin_copies(copies))


def test_a_job_whose_picture_is_there_is_not_rendered_and_gets_all_that_is_known_of_it(store: JobStore) -> None:
    source = done(store)
    batch_id = submit(store)
    job_id = f"{batch_id}-1"
    assert passed(store) == ([], {job_id: source})
    (copying,) = store.reuse.begin_copies({job_id: source})
    assert store.queries.job(job_id).state is JobState.PENDING
    assert copying.keys == {f"{source}.png": f"{batch_id}/00001-a-boat.a1.png"}
    assert store.reuse.record_copies([copying]) == []
    job = store.queries.job(job_id)
    assert (job.state, job.reused_from, job.attempt, job.worker) == (JobState.SUCCEEDED, source, 1, None)
    assert job.picture == replace(PICTURE, key=f"{batch_id}/00001-a-boat.a1.png")
    (attempt,) = store.queries.attempts(job_id)
    assert (attempt.outcome, attempt.worker, attempt.reason) == (Outcome.SUCCEEDED, None, f"a copy of {source}")
    status = store.queries.batch(batch_id)
    assert status.counts[JobState.SUCCEEDED] == 1
    assert status.done
    assert store.leftovers.find() == []
    assert passed(store) == ([], {})


def test_other_specs_and_seeds_that_were_drawn_are_other_work(store: JobStore) -> None:
    done(store)
    drawn = RenderSpec(prompt="a boat")
    batch_id = submit(store, SPEC.model_copy(update={"seed": 2}), RenderSpec(prompt="a cat", seed=1), drawn, drawn)
    assert passed(store) == ([f"{batch_id}-{n}" for n in (1, 2, 3, 4)], {})


def test_a_model_of_other_weights_renders_anew_and_then_serves_for_these(store: JobStore) -> None:
    done(store)
    store.workers.register(replace(WORKER, models=(ServedModel("tiny", sha256=OTHER),)))
    source = done(store, picture=replace(PICTURE, model_sha256=OTHER))
    job_id = f"{submit(store)}-1"
    assert passed(store) == ([], {job_id: source})


def test_while_workers_hold_different_weights_all_is_rendered(store: JobStore) -> None:
    done(store)
    store.workers.register(replace(WORKER, name="w2@host", models=(ServedModel("tiny", sha256=OTHER),)))
    job_id = f"{submit(store)}-1"
    assert passed(store) == ([job_id], {})


def test_while_nobody_serves_the_model_what_was_rendered_waits_to_know_the_weights(
    store: JobStore, database: Database
) -> None:
    source = done(store)
    store.workers.deregister(WORKER.name)
    batch_id = submit(store, SPEC, RenderSpec(prompt="a cat", seed=1))
    assert passed(store) == ([f"{batch_id}-2"], {})
    store.workers.register(WORKER)
    assert passed(store) == ([], {f"{batch_id}-1": source})
    with database.write() as session:  # the worker still serves the model, but has not loaded these weights
        session.execute(sa.update(WorkerRow).values(models=[{"name": "tiny"}]))
    assert passed(store) == ([f"{batch_id}-1"], {})


def test_twins_in_flight_are_rendered_once_and_the_others_get_copies(store: JobStore) -> None:
    first = submit(store, SPEC, SPEC, RenderSpec(prompt="a cat", seed=1))
    second = submit(store)
    assert passed(store) == ([f"{first}-1", f"{first}-3"], {})
    claim = claimed(store, f"{first}-1")
    assert passed(store) == ([], {})
    store.attempts.succeed(claim, PICTURE)
    bells, copies = passed(store)
    assert (bells, copies) == ([], {f"{first}-2": f"{first}-1", f"{second}-1": f"{first}-1"})
    assert copied(store, copies) == []
    assert store.queries.batch(second).done
    assert store.queries.job(f"{first}-2").reused_from == f"{first}-1"


@pytest.mark.parametrize("how", ["fails", "is cancelled", "is cancelled in the line", "goes back", "is paused"])
def test_when_its_twin_comes_to_nothing_the_next_one_goes(store: JobStore, how: str) -> None:
    batch_id = submit(store, SPEC, SPEC, SPEC)
    first, second, third = (f"{batch_id}-{n}" for n in (1, 2, 3))
    assert passed(store) == ([first], {})
    if how == "is cancelled in the line":
        store.steering.cancel(job_id=first)
    else:
        claim = claimed(store, first)
        assert passed(store) == ([], {})
        if how == "fails":
            store.attempts.fail(claim, "broke", ErrorClass.BAD_INPUT)
        elif how == "is cancelled":
            store.steering.cancel(job_id=first)
            store.attempts.stopped(claim)
        elif how == "is paused":
            store.steering.pause(job_id=first)
            store.attempts.hand_back(claim, "paused")
        else:
            store.attempts.hand_back(claim)
    (goes,), _ = passed(store)
    assert goes == (first if how == "goes back" else second)
    rendered(store, goes)
    _, copies = passed(store)
    assert third in copies
    if how == "fails":
        assert store.steering.retry(job_id=first) == 1
        assert passed(store)[1][first] == second
    if how == "is paused":
        assert first not in copies
        store.steering.resume(job_id=first)
        assert passed(store)[1][first] == second


def test_a_batch_without_reuse_neither_takes_nor_waits(store: JobStore) -> None:
    done(store)
    batch_id = submit(store, SPEC, SPEC, reuse=False)
    assert passed(store) == ([f"{batch_id}-1", f"{batch_id}-2"], {})


def test_without_a_dispatcher_that_leads_nobody_waits(store: JobStore, database: Database) -> None:
    done(store)
    with database.write() as session:
        session.execute(sa.text("DELETE FROM leaders"))
    batch_id = submit(store, SPEC, SPEC)
    assert passed(store) == ([f"{batch_id}-1", f"{batch_id}-2"], {})


def test_a_pass_without_copying_renders_and_still_waits_for_duplicates(store: JobStore) -> None:
    done(store)
    batch_id = submit(store, SPEC, SPEC)
    assert [bell.job_id for bell in store.backlog.enqueue(10).queued] == [f"{batch_id}-1"]


def test_a_more_urgent_twin_takes_the_place_of_one_that_lies_in_redis(store: JobStore) -> None:
    bulk = f"{submit(store, priority=10)}-1"
    assert passed(store) == ([bulk], {})
    urgent = f"{submit(store, priority=95)}-1"
    assert passed(store) == ([urgent], {})
    assert store.queries.job(bulk).state is JobState.PENDING
    claim = claimed(store, urgent)
    assert store.leases.claim(bulk, WORKER.name) is None  # the message of the preempted job is still queued
    more_urgent = f"{submit(store, priority=99)}-1"
    assert passed(store) == ([], {})  # a running job is not preempted
    store.attempts.succeed(claim, PICTURE)
    assert passed(store)[1] == {bulk: urgent, more_urgent: urgent}


def test_a_picture_that_is_deleted_or_withdrawn_serves_nobody(store: JobStore, database: Database) -> None:
    source = done(store)
    job_id = f"{submit(store)}-1"
    assert passed(store) == ([], {job_id: source})
    with database.write() as session:
        session.execute(
            sa.update(BatchRow)
            .where(BatchRow.id == store.queries.job(source).batch_id)
            .values(deleted_at=sa.func.now())
        )
    assert store.reuse.begin_copies({job_id: source}) == []
    assert passed(store) == ([job_id], {})
    rendered(store, job_id)
    store.reuse.withdraw(job_id)
    another = f"{submit(store)}-1"
    assert passed(store) == ([another], {})


@pytest.mark.parametrize("how", ["cancelled", "rendered", "copied"])
def test_a_copy_that_comes_too_late_changes_nothing(store: JobStore, how: str) -> None:
    source = done(store)
    job_id = f"{submit(store)}-1"
    (copying,) = store.reuse.begin_copies({job_id: source})
    if how == "cancelled":
        store.steering.cancel(job_id=job_id)
    elif how == "rendered":
        store.backlog.enqueue(10)
        rendered(store, job_id)
    else:
        assert copied(store, {job_id: source}) == []
    before = store.queries.job(job_id)
    assert store.reuse.record_copies([copying]) == [copying]
    assert store.queries.job(job_id) == before
    assert before.picture is None or before.picture.key not in copying.keys.values()
    assert [one.attempt for one in store.queries.attempts(job_id)] == list(range(1, before.attempt + 1))
    # Objects of the late copy are swept together with the other leftovers of the job's attempts.
    ((_, keys),) = store.leftovers.find()
    assert set(copying.keys.values()) <= set(keys)


def test_a_copy_that_breaks_off_leaves_the_job_as_it_was(store: JobStore) -> None:
    source = done(store)
    job_id = f"{submit(store)}-1"
    store.reuse.begin_copies({job_id: source})
    assert passed(store) == ([], {job_id: source})
    assert [bell.job_id for bell in store.backlog.enqueue(10).queued] == [job_id]
    claim = claimed(store, job_id)
    assert claim.attempt == 2
    assert claim.checkpoint_key is None
    assert store.attempts.succeed(claim, PICTURE)
    assert [one.outcome for one in store.queries.attempts(job_id)] == [Outcome.HANDED_BACK, Outcome.SUCCEEDED]


def test_a_job_that_waits_for_a_duplicate_does_not_block_those_behind_it(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_pass, "AHEAD", 30)
    new = [RenderSpec(prompt=f"new {n}", seed=n) for n in range(8)]
    batch_id = submit(store, *[SPEC] * 100, *new[:4], *[SPEC] * 30, *new[4:])
    served: list[str] = []
    for _ in range(12):
        bells, copies = passed(store, 2)
        assert copies == {}
        served += bells
        for job_id in bells:
            claim = claimed(store, job_id)
            if job_id != f"{batch_id}-1":
                store.attempts.succeed(claim, PICTURE)
    expected = [f"{batch_id}-{n}" for n in (1, *range(101, 105), *range(135, 139))]
    assert served == expected
    store.attempts.fail(replace(claim, job_id=f"{batch_id}-1"), "broke", ErrorClass.BAD_INPUT)
    assert passed(store)[0] == [f"{batch_id}-2"]


@pytest.fixture
def statements(database: Database) -> Iterator[list[str]]:
    """Collect the SQL statements executed from now on."""
    asked: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        asked.append(statement)

    sa.event.listen(database.engine, "before_cursor_execute", note)
    yield asked
    sa.event.remove(database.engine, "before_cursor_execute", note)


@contextmanager
def work_of(database: Database) -> Iterator[list[int]]:
    """Measure the work of the database within the block: SQLite's instructions in thousands, or rows read by
    PostgreSQL.
    """
    done = [0]
    if database.engine.dialect.name == "postgresql":
        before = _rows_read(database)
        yield done
        done[0] = _rows_read(database) - before
        return

    def count() -> int:
        done[0] += 1
        return 0

    def watch(connection: Any, *_: object) -> None:
        connection.set_progress_handler(count, 1000)

    sa.event.listen(database.engine, "checkout", watch)
    yield done
    sa.event.remove(database.engine, "checkout", watch)


def _rows_read(database: Database) -> int:
    with ExitStack() as opened:
        connections = [opened.enter_context(database.engine.connect()) for _ in range(database.engine.pool.checkedin())]
        for connection in connections:  # each connection reports its statistics with a delay of up to a second
            connection.execute(sa.text("SELECT pg_stat_force_next_flush()"))
            connection.commit()
        tables, indices = (
            connection.scalar(sa.text(f"SELECT sum({columns}) FROM {view}"))
            for columns, view in (
                ("seq_tup_read + coalesce(idx_tup_fetch, 0)", "pg_stat_user_tables"),
                ("idx_tup_read", "pg_stat_user_indexes"),
            )
        )
        return int(tables + indices)


def test_a_pass_asks_as_often_however_many_jobs_it_moves_and_never_for_drawn_seeds(
    store: JobStore, statements: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "_CORRECT_SECONDS", 0.0)  # each pass corrects charges, so that passes compare
    asked = []
    for count, seed in ((2, {}), (2, {"seed": 5}), (200, {"seed": 5})):
        submit(store, *(RenderSpec(prompt=f"{count} {n} {seed}", **seed) for n in range(count)))
        store.backlog.enqueue(0)  # loads what a pass reads only once
        statements.clear()
        bells, _ = passed(store, 500)
        assert len(bells) == count
        asked.append(len(statements))
        for job_id in bells:
            rendered(store, job_id)
    plain, few, many = asked
    assert few <= plain + 5
    assert many <= few + 1  # the durations of a thousand ended jobs are read in several statements


@pytest.mark.parametrize(
    ("query", "index"),
    [
        (reuse.works_in(JobState.QUEUED), "ix_jobs_queued"),
        (reuse.works_in(JobState.RUNNING), "ix_jobs_running"),
        (reuse.pictures_of(["a" * 64, "b" * 64]), "ix_jobs_work_done"),
    ],
)
def test_what_a_pass_asks_of_works_is_answered_by_indices(
    store: JobStore, database: Database, query: sa.Select[object], index: str
) -> None:
    submit(store, *(RenderSpec(prompt=f"prompt {n}", seed=n) for n in range(3000)))
    for job_id in passed(store, 300)[0][:200]:
        rendered(store, job_id)
    if database.engine.dialect.name == "postgresql":
        with database.write() as session:
            session.execute(sa.text("ANALYZE"))
    how = plan(database, query)
    assert index in how, how
    assert "Seq Scan on jobs" not in how
    assert not re.search(r"SCAN jobs(?! USING)", how), how


def test_a_pass_over_a_long_backlog_of_twins_takes_no_longer(
    store: JobStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "_CORRECT_SECONDS", math.inf)  # a correction would read the whole backlog

    def work() -> int:
        if database.engine.dialect.name == "postgresql":
            with database.write() as session:
                session.execute(sa.text("ANALYZE"))
        with work_of(database) as done:
            passed(store, 8)
        return done[0]

    submit(store, *[SPEC] * 2000)
    passed(store, 8)
    short = work()
    submit(store, *[SPEC] * 20_000)
    long = [work() for _ in range(3)]
    assert max(long) <= 2 * short
    with database.read() as session:
        assert session.scalar(sa.select(sa.func.count()).where(JobRow.state == "queued")) == 1

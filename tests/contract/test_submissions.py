"""Submission of batches, on every database: atomic, idempotent under a key, and a million jobs in little memory."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.errors import DatabaseUnavailable, ErrorClass, InvalidInput, KeyUsed, NotFound
from farm.jobs.database import Database, now_plus
from farm.jobs.records import WorkerInfo
from farm.jobs.schema import BatchRow, JobCountRow, JobRow, WorkerRow
from farm.jobs.served_models import ServedModel
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.spec import RenderSpec


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore.over(database, Settings(database_url="", broker_url="", s3_bucket=""))


def some(count: int, **fields: object) -> Iterator[RenderSpec]:
    return (RenderSpec(prompt=f"prompt {n}", **fields) for n in range(1, count + 1))


def rows(database: Database) -> tuple[int, int, int]:
    """Count the batches, jobs and job counts, staged ones included."""
    with database.read() as session:
        batches, jobs, counts = (
            session.scalar(sa.select(sa.func.count()).select_from(table)) for table in (BatchRow, JobRow, JobCountRow)
        )
    return batches or 0, jobs or 0, counts or 0


def test_specs_come_back_as_they_were(store: JobStore) -> None:
    specs = [
        RenderSpec(prompt='tab\t newline\n quote " backslash \\ \\N 🎨 \u2028', seed=1, scheduler="euler_a"),
        RenderSpec(prompt="", width=64, height=128, model="org/name", trajectory=True),
    ]
    jobs = store.queries.jobs(store.submissions.submit("batch", "me", 50, specs))
    assert [job.spec for job in jobs] == specs
    assert [(job.state, job.attempt, job.tries) for job in jobs] == [(JobState.PENDING, 0, 0)] * 2


def test_nobody_sees_a_submission_before_its_end(store: JobStore, database: Database) -> None:
    def looking() -> Iterator[RenderSpec]:
        for n, spec in enumerate(some(5000)):
            yield spec
            if n % 1000 == 999:
                assert store.queries.batches() == []
                assert store.overview.waiting_by_model() == {}
        assert rows(database)[1] > 0
        assert store.backlog.enqueue(10).queued == []

    status = store.queries.batch(store.submissions.submit("batch", "me", 50, looking()))
    assert status.counts[JobState.PENDING] == status.total == 5000


@pytest.mark.parametrize("after", [1, 4500])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_submission_that_breaks_midway_leaves_nothing(
    store: JobStore, database: Database, after: int, error: type[BaseException]
) -> None:
    def broken() -> Iterator[RenderSpec]:
        yield from some(after)
        raise error("the source broke")

    with pytest.raises(error, match="the source broke"):
        store.submissions.submit("half", "me", 50, broken())
    assert rows(database) == (0, 0, 0)


def test_a_submission_of_nothing_is_refused(store: JobStore, database: Database) -> None:
    with pytest.raises(InvalidInput, match="nothing to render"):
        store.submissions.submit("none", "me", 50, [])
    assert rows(database) == (0, 0, 0)


def test_what_a_crash_left_is_found_after_an_hour_and_discarded(store: JobStore, database: Database) -> None:
    def crashing() -> Iterator[RenderSpec]:
        yield from some(4500)
        # A killed process does not clean up.
        store.submissions.discard = lambda batch_id: None  # type: ignore[method-assign]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.submissions.submit("half", "me", 50, crashing())
    del store.submissions.discard
    whole = store.submissions.submit("whole", "me", 50, some(3))
    assert rows(database)[1] > 3
    assert store.submissions.abandoned() == []
    with database.write() as session:
        session.execute(sa.update(BatchRow).values(created_at=now_plus(sa.literal(-3700.0))))
    (half,) = store.submissions.abandoned()
    with pytest.raises(NotFound):
        store.queries.batch(half)
    store.submissions.discard(half)
    assert rows(database)[:2] == (1, 3)
    assert store.queries.batch(whole).total == 3


def test_a_submission_whose_acceptance_lost_its_answer_is_the_batch_that_was_accepted(
    store: JobStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = database.write

    @contextmanager
    def answerless() -> Iterator[Session]:
        with write() as session:
            yield session
        if store.queries.batches():
            raise DatabaseUnavailable("the connection broke after the commit")

    monkeypatch.setattr(database, "write", answerless)
    batch_id = store.submissions.submit("batch", "me", 50, some(4500))
    monkeypatch.undo()
    assert store.queries.batch(batch_id).total == 4500
    assert rows(database)[:2] == (1, 4500)


def test_an_accepted_batch_is_never_discarded(store: JobStore, database: Database) -> None:
    store.submissions.discard(store.submissions.submit("batch", "me", 50, some(3)))
    assert rows(database)[:2] == (1, 3)


def test_a_submission_that_was_swept_away_under_its_writer_is_refused(store: JobStore, database: Database) -> None:
    def slow() -> Iterator[RenderSpec]:
        yield from some(4001)
        with database.read() as session:
            batch_id = session.scalars(sa.select(BatchRow.id)).one()
        store.submissions.discard(batch_id)

    with pytest.raises(NotFound, match="try again"):
        store.submissions.submit("slow", "me", 50, slow())
    assert rows(database)[:2] == (0, 0)


def test_the_same_key_and_specs_are_the_same_batch(store: JobStore, database: Database) -> None:
    first = store.submissions.submit("batch", "me", 50, some(2500), key="monday")
    assert store.submissions.submit("batch", "me", 50, some(2500), key="monday") == first
    assert rows(database)[:2] == (1, 2500)
    # The same key of another owner, and a missing key, make new batches.
    assert store.submissions.submit("batch", "you", 50, some(3), key="monday") != first
    assert store.submissions.submit("batch", "me", 50, some(2500)) != first


@pytest.mark.parametrize("others", [2499, 2501])
def test_the_same_key_for_other_specs_is_refused(store: JobStore, database: Database, others: int) -> None:
    first = store.submissions.submit("batch", "me", 50, some(2500), key="monday")
    with pytest.raises(KeyUsed, match=f"'monday' was used for batch {first} of 2500 jobs"):
        store.submissions.submit("batch", "me", 50, some(others), key="monday")
    with pytest.raises(KeyUsed):
        store.submissions.submit("batch", "me", 50, some(2500, num_inference_steps=3), key="monday")
    assert rows(database)[:2] == (1, 2500)


def test_seeds_nobody_chose_are_drawn_from_key_and_place(store: JobStore) -> None:
    specs = [RenderSpec(prompt="a"), RenderSpec(prompt="a"), RenderSpec(prompt="a", seed=7)]
    seeds = [
        job.spec.seed for job in store.queries.jobs(store.submissions.submit("batch", "me", 50, specs, key="monday"))
    ]
    assert seeds[2] == 7
    assert len(set(seeds)) == 3
    other = [
        job.spec.seed for job in store.queries.jobs(store.submissions.submit("batch", "me", 50, specs, key="tuesday"))
    ]
    assert not set(seeds[:2]) & set(other[:2])


def test_two_submissions_at_once_under_one_key_become_one_batch(store: JobStore, database: Database) -> None:
    half_way, accepted = threading.Event(), threading.Event()
    ids = []

    def slow() -> Iterator[RenderSpec]:
        for n, spec in enumerate(some(4500)):
            if n == 4400:
                half_way.set()
                assert accepted.wait(60)
            yield spec

    slower = threading.Thread(
        target=lambda: ids.append(store.submissions.submit("slow", "me", 50, slow(), key="monday"))
    )
    slower.start()
    assert half_way.wait(60)
    first = store.submissions.submit("quick", "me", 50, some(4500), key="monday")
    accepted.set()
    slower.join()
    assert ids == [first]
    assert rows(database)[:2] == (1, 4500)


def test_work_is_known_by_its_hash_where_a_seed_was_chosen_and_it_may_be_reused(
    store: JobStore, database: Database
) -> None:
    spec = RenderSpec(prompt="a", seed=1)
    store.submissions.submit("a", "me", 50, [spec, RenderSpec(prompt="a")])
    store.submissions.submit("b", "me", 50, [spec], reuse=False)
    with database.read() as session:
        found = session.scalars(sa.select(JobRow.work_sha256).join(BatchRow).order_by(BatchRow.name, JobRow.position))
        assert found.all() == [spec.sha256(), None, None]


def test_workers_go_on_writing_while_a_large_batch_comes_in(store: JobStore) -> None:
    batch_id = store.submissions.submit("small", "me", 50, some(200))
    bells = store.backlog.enqueue(200).queued
    writer = threading.Thread(target=lambda: store.submissions.submit("large", "me", 50, some(60_000)))
    writer.start()
    claimed = 0
    while writer.is_alive() and claimed < 200:
        assert store.leases.claim(bells[claimed].job_id, "w1@host")
        claimed += 1
    writer.join()
    assert claimed >= 10
    assert store.queries.batch(batch_id).counts[JobState.RUNNING] == claimed


MEMORY = """
import re, sys
from pathlib import Path
from farm.jobs.database import Database
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.spec import RenderSpec
database = Database(sys.argv[1])
store = JobStore.over(database, Settings(database_url="", broker_url="", s3_bucket=""))
def most():  # getrusage's begins with what the parent had
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = most()
store.submissions.submit("large", "me", 50, (RenderSpec(prompt=f"prompt {n}", seed=n) for n in range(int(sys.argv[2]))))
print(most() - before)
"""


def test_memory_does_not_grow_with_the_submission(database_url: str) -> None:
    def grown(count: int) -> int:
        told = subprocess.run(
            [sys.executable, "-c", MEMORY, database_url, str(count)], check=True, capture_output=True, text=True
        )
        return int(told.stdout)

    small, large = grown(10_000), grown(40_000)
    assert large < small + 10_000  # in KiB; forty thousand specs alone take 60 MB


def test_a_status_reads_no_jobs_and_lists_go_by_cursor(store: JobStore, database: Database) -> None:
    batch_id = store.submissions.submit("batch", "me", 50, some(5000))
    claims = [store.leases.claim(bell.job_id, "w1@host") for bell in store.backlog.enqueue(30).queued]
    for claim in claims[:20]:
        assert claim is not None
        store.attempts.fail(claim, "bad spec", ErrorClass.BAD_INPUT)
    asked: list[str] = []
    sa.event.listen(database.engine, "before_cursor_execute", lambda *args: asked.append(args[2]))
    status = store.queries.batch(batch_id)
    assert (status.counts[JobState.FAILED], status.counts[JobState.RUNNING]) == (20, 10)
    assert not any("FROM jobs" in statement for statement in asked)
    ended = []
    while found := store.queries.finished(batch_id, ended[-1] if ended else None, limit=7):
        ended += found
    assert sorted(job.index for job in ended) == list(range(1, 21))
    assert [job.finished_at for job in ended] == sorted(job.finished_at for job in ended if job.finished_at)
    assert sorted(job.index for job in store.queries.running(batch_id)) == list(range(21, 31))


def test_a_model_that_no_living_worker_holds_is_told(store: JobStore, database: Database) -> None:
    store.workers.register(WorkerInfo("w1@host", "cpu", "float32", 8, "0", (ServedModel("tiny"),)))
    held = store.submissions.submit("held", "me", 50, some(3))
    waits = store.submissions.submit("waits", "me", 50, [*some(3), *some(1, model="flux"), *some(1, model="sd15")])
    store.backlog.enqueue(1)
    assert store.overview.unheld() == store.overview.unheld(waits) == ["flux", "sd15"]
    assert store.overview.unheld(held) == []
    store.workers.register(WorkerInfo("w2@host", "cpu", "float32", 8, "0", (ServedModel("flux"), ServedModel("sd15"))))
    assert store.overview.unheld() == []
    with database.write() as session:
        session.execute(sa.update(WorkerRow).values(seen_at=now_plus(sa.literal(-100.0))))
    assert store.overview.unheld(held) == ["tiny"]

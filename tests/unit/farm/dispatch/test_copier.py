"""Copies of pictures: successful copies, late copies, and an object store that hangs, fails or lost the picture."""

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import sqlalchemy as sa

from farm.dispatch.copier import Copier
from farm.errors import DatabaseUnavailable, StorageUnavailable
from farm.jobs.schema import ArtifactRow
from farm.jobs.states import JobState, Outcome
from farm.objects.storage import Storage
from tests.integration.conftest import wait_until
from tests.unit.farm.dispatch.conftest import WORKER, Parts

PENDING, SUCCEEDED, CANCELLED = JobState.PENDING, JobState.SUCCEEDED, JobState.CANCELLED


@pytest.fixture
def copier(parts: Parts) -> Copier:
    return Copier(parts.store.reuse, parts.storage, parts.clock)


def twins(parts: Parts, count: int = 1, **fields: Any) -> tuple[str, list[str]]:
    """Return a job with a picture, and pending jobs with the same spec."""
    (source,) = parts.submit(1, "original", prompt="the same", seed=7, **fields)
    parts.succeed(source)
    return source, parts.submit(count, "copies", prompt="the same", seed=7, **fields)


def copies_are_wanted(parts: Parts) -> None:
    """Elect a dispatcher and register a worker with the pictures' weights: passes offer copies only then."""
    parts.give_leadership_to("a dispatcher")
    parts.store.workers.register(WORKER)


def serves(parts: Parts, source: str) -> bool:
    """Return whether a pass offers a job's picture to another job with the same spec."""
    copies_are_wanted(parts)
    parts.submit(1, "asks", prompt="the same", seed=7)
    return source in parts.store.backlog.enqueue(100, copy=True).copies.values()


# --- one by one ---------------------------------------------------------------------------------------------------


def test_a_job_succeeds_with_a_copy_of_its_twins_picture(parts: Parts, copier: Copier) -> None:
    source, (job,) = twins(parts)
    assert copier.copy({job: source}) == 1
    found, original = parts.store.queries.job(job), parts.store.queries.job(source)
    assert (found.state, found.reused_from) == (SUCCEEDED, source)
    assert found.picture is not None
    assert original.picture is not None
    assert found.picture.key != original.picture.key
    assert parts.storage.get(found.picture.key) == parts.storage.get(original.picture.key)
    assert [attempt.outcome for attempt in parts.store.queries.attempts(job)] == [Outcome.SUCCEEDED]


@pytest.mark.parametrize("listed", [True, False], ids=["of this release", "of a release that lists no artifacts"])
def test_a_trajectory_is_copied_with_its_picture(parts: Parts, copier: Copier, listed: bool) -> None:
    source, (job,) = twins(parts, trajectory=True)
    if not listed:
        with parts.db.write() as session:
            session.execute(sa.delete(ArtifactRow))
    assert copier.copy({job: source}) == 1
    found = parts.store.queries.job(job)
    assert found.picture is not None
    stem = found.picture.key.removesuffix(".png")
    copied = {found.picture.key, f"{stem}.trajectory.png", f"{stem}.trajectory.webp"}
    assert set(parts.storage.keys(stem)) == copied
    assert {artifact.key for artifact in found.artifacts} == copied


def test_a_picture_that_is_gone_serves_no_job_any_more(
    parts: Parts, copier: Copier, caplog: pytest.LogCaptureFixture
) -> None:
    source, (job,) = twins(parts)
    assert serves(parts, source)
    parts.storage.delete_many(list(parts.storage.keys()))
    assert copier.copy({job: source}) == 0
    assert parts.states([job]) == [PENDING]
    assert f"the picture of job_id={source} is missing" in caplog.text
    assert not serves(parts, source)


def test_a_picture_of_another_size_than_recorded_serves_no_job_any_more(parts: Parts, copier: Copier) -> None:
    source, (job,) = twins(parts)
    picture = parts.store.queries.job(source).picture
    assert picture is not None
    parts.storage.put(picture.key, b"something else")
    assert copier.copy({job: source}) == 0
    assert parts.states([job]) == [PENDING]
    assert not serves(parts, source)


def test_a_picture_of_which_a_trajectory_is_gone_serves_no_job_any_more(parts: Parts, copier: Copier) -> None:
    source, (job,) = twins(parts, trajectory=True)
    picture = parts.store.queries.job(source).picture
    assert picture is not None
    parts.storage.delete(picture.key.replace(".png", ".trajectory.webp"))
    assert copier.copy({job: source}) == 0
    assert parts.states([job]) == [PENDING]


def test_an_object_store_that_is_away_leaves_the_picture_in_service(parts: Parts, copier: Copier) -> None:
    source, (job,) = twins(parts)
    parts.storage.away = True
    with pytest.raises(StorageUnavailable):
        copier.copy({job: source})
    assert parts.states([job]) == [PENDING]
    assert serves(parts, source)


def test_copies_made_before_the_object_store_went_away_are_recorded(parts: Parts, copier: Copier) -> None:
    source, jobs = twins(parts, 3)
    copy = parts.storage.copy

    def second_fails(*arguments: Any) -> bool:
        if len(parts.storage.copied) == 1:
            parts.storage.fails = StorageUnavailable("the test says so")
        return copy(*arguments)

    parts.storage.copy = second_fails  # type: ignore[method-assign]
    with pytest.raises(StorageUnavailable):
        copier.copy(dict.fromkeys(jobs, source))
    assert sorted(parts.states(jobs)) == sorted([SUCCEEDED, PENDING, PENDING])


def test_a_source_that_can_not_serve_is_not_copied(parts: Parts, copier: Copier) -> None:
    source, (job,) = twins(parts)
    parts.store.deletions.mark(source.rpartition("-")[0])
    assert copier.copy({job: source, "no-such-job-1": source}) == 0
    assert parts.states([job]) == [PENDING]
    assert parts.storage.copied == ()


def test_a_copy_for_a_job_that_was_cancelled_meanwhile_is_deleted(parts: Parts, copier: Copier) -> None:
    source, (job,) = twins(parts)
    before = set(parts.storage.keys())
    copy = parts.storage.copy

    def cancelled_meanwhile(*arguments: Any) -> bool:
        assert parts.store.steering.cancel(job_id=job) == 1
        return copy(*arguments)

    parts.storage.copy = cancelled_meanwhile  # type: ignore[method-assign]
    assert copier.copy({job: source}) == 0
    assert parts.states([job]) == [CANCELLED]
    assert set(parts.storage.keys()) == before


def test_sql_away_leaves_a_copy_to_be_begun_again(parts: Parts, copier: Copier) -> None:
    source, (job,) = twins(parts)
    with parts.sql_is_away(), pytest.raises(DatabaseUnavailable):
        copier.copy({job: source})
    assert copier.copy({job: source}) == 1


class _Answers404(BaseHTTPRequestHandler):
    """Answers as a proxy does while its object store restarts: with 404, and without an error code of S3."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def proxy_without_a_store() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers404) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_404_that_is_not_of_the_object_store_leaves_the_picture_in_service(parts: Parts) -> None:
    source, (job,) = twins(parts)
    with proxy_without_a_store() as address:
        nowhere = parts.settings.model_copy(update={"s3_endpoint_url": address})
        with closing(Storage(nowhere)) as storage, pytest.raises(StorageUnavailable):
            Copier(parts.store.reuse, storage, parts.clock).copy({job: source})
    assert parts.states([job]) == [PENDING]
    assert serves(parts, source)


# --- threads ------------------------------------------------------------------------------------------------------


@contextmanager
def copying(copier: Copier) -> Iterator[None]:
    """Run the copier's threads."""
    stop = threading.Event()
    copier.start(stop)
    try:
        yield
    finally:
        stop.set()


def test_what_is_offered_is_copied(parts: Parts, copier: Copier) -> None:
    source, jobs = twins(parts, 40)
    with copying(copier):
        copier.offer(dict.fromkeys(jobs, source))
        wait_until(lambda: set(parts.states(jobs)) == {SUCCEEDED}, "all have their copies")
    assert copier.ready


def test_an_offer_replaces_the_one_before(parts: Parts, copier: Copier) -> None:
    source, (first, second) = twins(parts, 2)
    copier.offer({first: source})
    copier.offer({second: source})
    with copying(copier):
        wait_until(lambda: parts.states([second]) == [SUCCEEDED], "what was offered last is copied")
    assert parts.states([first]) == [PENDING]


def test_an_object_store_that_hangs_holds_up_no_pass_and_nothing_is_copied_twice(parts: Parts) -> None:
    _, jobs = twins(parts, 2)
    copies_are_wanted(parts)
    dispatcher = parts.dispatcher()
    may_go_on = parts.storage.copies_may_go_on = threading.Event()
    with copying(dispatcher._copier):
        assert dispatcher.fill() == 0
        wait_until(lambda: len(parts.storage.copied) == 1, "a copy hangs")
        others = parts.submit(2, "others")
        assert dispatcher.fill() == 2, "passes go on, and offer the same copies again"
        assert parts.states(others) == [JobState.QUEUED] * 2
        assert parts.states(jobs) == [PENDING] * 2
        may_go_on.set()
        wait_until(lambda: parts.states(jobs) == [SUCCEEDED] * 2, "the copies are made")
    assert [one.outcome for job in jobs for one in parts.store.queries.attempts(job)] == [Outcome.SUCCEEDED] * 2
    assert len(parts.storage.copied) == 2


def test_a_copier_waits_after_an_error_and_longer_after_each_further_one(
    parts: Parts, copier: Copier, caplog: pytest.LogCaptureFixture
) -> None:
    source, (job,) = twins(parts)
    parts.storage.fails = StorageUnavailable("the test says so")

    def pause() -> float:
        """Let a copy fail, and advance the clock until the copier is ready again; returns the elapsed time."""
        began = parts.clock.now
        wait_until(lambda: not copier.ready, "the copier notices")
        while not copier.ready:
            parts.clock.pass_by(0.25)
        return parts.clock.now - began

    with copying(copier):
        pauses = []
        for _ in range(8):
            copier.offer({job: source})
            pauses.append(pause())
        assert "can't copy pictures" in caplog.text
        assert pauses[0] <= 5.25
        assert max(pauses[-2:]) > 10
        assert max(pauses) <= 60.25
        parts.storage.fails = None
        copier.offer({job: source})
        wait_until(lambda: parts.states([job]) == [SUCCEEDED], "it is copied when the store is back")
        parts.storage.fails = StorageUnavailable("again")
        (late,) = parts.submit(1, "late", prompt="the same", seed=7)
        copier.offer({late: source})
        assert pause() <= 5.25, "a copy that succeeded begins the pauses from the first"


def test_nothing_is_copied_while_the_copier_is_not_ready(parts: Parts, copier: Copier) -> None:
    source, (job,) = twins(parts)
    copier._pause("the test says so")
    copier.offer({job: source})
    assert copier._take() == {}
    parts.clock.pass_by(60)
    assert copier._take() == {job: source}


def test_a_job_that_could_be_copied_is_rendered_while_the_copier_is_not_ready(parts: Parts) -> None:
    _, jobs = twins(parts, 2)
    copies_are_wanted(parts)
    dispatcher = parts.dispatcher()
    assert dispatcher.fill() == 0, "both wait for copies"
    dispatcher._copier._pause("the test says so")
    assert dispatcher.fill() == 1, "one is rendered, and its twin waits for it"
    assert sorted(parts.states(jobs)) == [PENDING, JobState.QUEUED]


def test_copying_goes_on_after_an_error_that_nobody_expected(
    parts: Parts, copier: Copier, caplog: pytest.LogCaptureFixture
) -> None:
    source, (job,) = twins(parts)
    parts.storage.fails = ZeroDivisionError("nobody has thought of that")
    with copying(copier):
        copier.offer({job: source})
        wait_until(lambda: not copier.ready, "the copier notices")
        assert "ZeroDivisionError" in caplog.text
        parts.storage.fails = None
        parts.clock.pass_by(60)
        copier.offer({job: source})
        wait_until(lambda: parts.states([job]) == [SUCCEEDED], "it is copied")


def test_several_threads_that_fail_at_once_count_as_one_error(parts: Parts, copier: Copier) -> None:
    copier._pause("first")
    copier._pause("second")
    parts.clock.pass_by(5)
    assert copier.ready

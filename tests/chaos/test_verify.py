"""Each check detects its breach: a correct farm is corrupted in one place, and the matching check must report it."""

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from farm.dispatch.copier import Copier
from farm.dispatch.retention import Retention
from farm.errors import ErrorClass
from farm.jobs.database import Database, now
from farm.jobs.records import Claim, Picture
from farm.jobs.schema import AttemptRow, BatchRow, JobCountRow, JobRow
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.settings import Settings
from farm.specs.object_keys import checkpoint_key, image_key, manifest_key
from farm.specs.spec import RenderSpec
from tests.chaos import moves, verify
from tests.chaos.orders import Journal, Order, Scale, order
from tests.gated import pixel

SCALE = Scale(jobs=1, batch=(3, 3), steps=(2, 4), seconds_per_step=0, backlog=1)


@dataclass
class Quiet:
    """A farm without faults, and the data that the checks read."""

    db: Database
    store: JobStore
    storage: Storage
    journal: Journal
    logs: dict[str, str]
    deaths: list[str]

    def run(self, name: str, *, cancelled: bool = False) -> None:
        """Submit an order and render its jobs; the first job needs a second attempt."""
        wanted = order(1, name, SCALE)
        self.journal.write("asks", name, priority=wanted.priority)
        batch_id = self.store.submissions.submit(name, wanted.owner, wanted.priority, wanted.specs)
        self.journal.write("has", name, batch=batch_id)
        if cancelled:
            self.journal.write("cancels", name)
            self.store.steering.cancel(batch_id=batch_id)
            return
        for bell in self.store.backlog.enqueue(100).queued:
            if bell.job_id.endswith("-1"):
                self.store.attempts.hand_back(self._claim(bell.job_id))
            else:
                self.render(self._claim(bell.job_id))
        for bell in self.store.backlog.enqueue(100).queued:
            self.render(self._claim(bell.job_id))

    def _claim(self, job_id: str) -> Claim:
        claim = self.store.leases.claim(job_id, "w1@host")
        assert claim is not None
        return claim

    def render(self, claim: Claim) -> None:
        """Finish a claimed job with the picture of the null pipeline."""
        spec = claim.spec
        data = drawn(claim.job_id, claim.attempt, spec)
        key = image_key(claim.batch_id, claim.index, claim.attempt, spec.prompt)
        self.storage.put(key, data)
        picture = Picture(key, hashlib.sha256(data).hexdigest(), len(data), spec.width, spec.height, "0" * 64, 0.1)
        assert self.store.attempts.succeed(claim, picture)
        self.logs["w1"] += f"2026-11-23 01:00:00 ended job_id={claim.job_id} attempt={claim.attempt} now=succeeded\n"

    def found(self) -> set[str]:
        """Names of the checks that report a breach."""
        evidence = verify.Evidence.gather(self.db, self.storage, self.journal, self.ordered, self.logs, self.deaths)
        told = list(verify.breaches(evidence))
        return {text.partition(" [")[0] for text in told if not text.startswith("the story of")}

    def ordered(self, name: str, priority: int) -> Order:
        """The order submitted under a name; `again` is a copy of the first order."""
        return order(1, "first" if name == "again" else name, SCALE, priority=priority)

    def job(self, index: int = 2) -> JobRow:
        """A job of the first batch, whose jobs all succeeded."""
        with self.db.read() as session:
            batch = session.scalars(sa.select(BatchRow).where(BatchRow.name == "first")).one()
            job = session.scalars(sa.select(JobRow).where(JobRow.batch_id == batch.id, JobRow.position == index)).one()
            session.expunge_all()
        return job

    def set(self, index: int = 2, **values: object) -> None:
        """Update the row of a job directly; the triggers record it as a move."""
        with self.db.write() as session:
            session.execute(sa.update(JobRow).where(JobRow.id == self.job(index).id).values(**values))

    def rewrite(self, **values: object) -> None:
        """Replace a picture by that of another spec, job or attempt, and update its hash in SQL."""
        job = self.job()
        spec = RenderSpec.model_validate(job.spec).model_copy(
            update={name: value for name, value in values.items() if name in RenderSpec.model_fields}
        )
        data = drawn(str(values.get("job_id", job.id)), int(str(values.get("attempt", job.attempt))), spec)
        self.storage.put(str(job.image_key), data)
        with self.db.engine.begin() as connection:  # not to be recorded as a move
            connection.exec_driver_sql("DROP TRIGGER chaos_moved" + self._on_jobs)
        self.set(image_sha256=hashlib.sha256(data).hexdigest(), image_bytes=len(data))

    def unwatched(self, index: int = 2, **values: object) -> None:
        """Update the row of a job without recording a move."""
        with self.db.engine.begin() as connection:
            connection.exec_driver_sql("DROP TRIGGER chaos_moved" + self._on_jobs)
        self.set(index, **values)

    @property
    def _on_jobs(self) -> str:
        return " ON jobs" if self.db.engine.dialect.name == "postgresql" else ""


def drawn(job_id: str, attempt: int, spec: RenderSpec) -> bytes:
    """A picture much like that of the null pipeline."""
    text, out = PngInfo(), io.BytesIO()
    text.add_itxt("diffusion-farm", f'{{"job": "{job_id}", "attempt": {attempt}}}')
    assert spec.width is not None
    assert spec.height is not None
    Image.new("RGB", (spec.width, spec.height), pixel(spec.seed)).save(out, "PNG", pnginfo=text)
    return out.getvalue()


@pytest.fixture
def quiet(settings: Settings, database: Database, tmp_path: Path) -> Iterator[Quiet]:
    moves.install(database)
    storage = Storage(settings)
    quiet = Quiet(database, JobStore.over(database, settings), storage, Journal(tmp_path / "journal"), {"w1": ""}, [])
    quiet.run("first")
    quiet.run("second", cancelled=True)
    Retention(quiet.store, storage, settings).turn()
    yield quiet
    storage.close()


def test_a_farm_that_was_left_in_peace_breaches_nothing(quiet: Quiet) -> None:
    assert quiet.found() == set()


def again(quiet: Quiet) -> list[str]:
    """Submit the first order again and copy its pictures, one at the second try; returns the ids of the new jobs."""
    specs = quiet.ordered("again", 50).specs
    quiet.journal.write("asks", "again", priority=50)
    batch_id = quiet.store.submissions.submit("again", "me", 50, specs)
    sources = {f"{batch_id}-{index}": quiet.job(index).id for index in range(1, len(specs) + 1)}
    quiet.store.reuse.begin_copies({f"{batch_id}-1": quiet.job(1).id})
    assert Copier(quiet.store.reuse, quiet.storage).copy(sources) == len(specs)
    return list(sources)


def test_copies_breach_nothing(quiet: Quiet) -> None:
    again(quiet)
    assert quiet.found() == set()


def test_a_copy_that_says_to_be_of_another_picture_than_it_is_breaches(quiet: Quiet) -> None:
    job_ids = again(quiet)
    with quiet.db.write() as session:
        session.execute(sa.update(JobRow).where(JobRow.id == job_ids[1]).values(reused_from=quiet.job(3).id))
    assert quiet.found() == {"pictures_are_what_sql_says"}


def half_submitted(quiet: Quiet) -> None:
    with quiet.db.write() as session:
        session.execute(sa.delete(JobRow).where(JobRow.id == quiet.job(3).id))


def submitted_twice(quiet: Quiet) -> None:
    wanted = order(1, "second", SCALE)
    quiet.store.steering.cancel(
        batch_id=quiet.store.submissions.submit("second", wanted.owner, wanted.priority, wanted.specs)
    )


def accepted_and_gone(quiet: Quiet) -> None:
    quiet.journal.write("asks", "third", priority=1)
    quiet.journal.write("has", "third")


def broken_off_and_there(quiet: Quiet) -> None:
    quiet.journal.write("breaks", "second")


def moved_unaccepted(quiet: Quiet) -> None:
    batch_id = quiet.store.submissions.submit("half", "me", 50, [RenderSpec(prompt="half")])
    (bell,) = quiet.store.backlog.enqueue(10).queued
    with quiet.db.write() as session:
        session.execute(sa.update(BatchRow).where(BatchRow.id == batch_id).values(accepted_at=None))
    assert bell.job_id.startswith(batch_id)


def left_waiting(quiet: Quiet) -> None:
    wanted = order(1, "third", SCALE)
    quiet.journal.write("asks", "third", priority=wanted.priority)
    quiet.store.submissions.submit("third", wanted.owner, wanted.priority, wanted.specs)


def failed(quiet: Quiet) -> None:
    wanted = order(1, "third", SCALE)
    quiet.journal.write("asks", "third", priority=wanted.priority)
    quiet.store.submissions.submit("third", wanted.owner, wanted.priority, wanted.specs)
    first, *rest = [quiet._claim(bell.job_id) for bell in quiet.store.backlog.enqueue(10).queued]
    quiet.store.attempts.fail(first, "broke", ErrorClass.BAD_INPUT)
    for claim in rest:
        quiet.render(claim)


def other_bytes(quiet: Quiet) -> None:
    quiet.storage.put(str(quiet.job().image_key), b"not a picture")


def picture_lost(quiet: Quiet) -> None:
    quiet.storage.delete(str(quiet.job().image_key))


def other_colour(quiet: Quiet) -> None:
    quiet.rewrite(seed=1)


def other_size(quiet: Quiet) -> None:
    quiet.rewrite(width=128, height=128)


def another_jobs_picture(quiet: Quiet) -> None:
    quiet.rewrite(job_id=quiet.job(3).id)


def another_attempts_picture(quiet: Quiet) -> None:
    quiet.rewrite(attempt=7)


def orphan(quiet: Quiet) -> None:
    quiet.storage.put(str(quiet.job(1).image_key).replace(".a2.", ".a1."), b"of the attempt that lost")


def checkpoint_left(quiet: Quiet) -> None:
    job = quiet.job()
    quiet.storage.put(checkpoint_key(job.batch_id, job.position, job.attempt), b"state")


def manifest_lost(quiet: Quiet) -> None:
    quiet.storage.delete(manifest_key(quiet.job().batch_id))


def manifest_of_another_batch(quiet: Quiet) -> None:
    quiet.storage.put(manifest_key(quiet.job().batch_id), b"")


def moved_on_after_the_end(quiet: Quiet) -> None:
    quiet.set(state="pending")
    quiet.set(state="succeeded")


def written_to_after_the_end(quiet: Quiet) -> None:
    quiet.set(finished_at=now())


def attempt_without_a_claim(quiet: Quiet) -> None:
    quiet.set(attempt=2)
    quiet.set(attempt=1)


def state_behind_the_moves(quiet: Quiet) -> None:
    quiet.unwatched(state="failed")


def attempt_without_a_row(quiet: Quiet) -> None:
    with quiet.db.write() as session:
        session.execute(sa.delete(AttemptRow).where(AttemptRow.job_id == quiet.job().id))


def attempt_that_ended_before_the_last(quiet: Quiet) -> None:
    with quiet.db.write() as session:
        first = (AttemptRow.job_id == quiet.job(1).id, AttemptRow.attempt == 1)
        session.execute(sa.update(AttemptRow).where(*first).values(outcome="succeeded"))


def attempts_at_the_same_time(quiet: Quiet) -> None:
    with quiet.db.write() as session:
        first = (AttemptRow.job_id == quiet.job(1).id, AttemptRow.attempt == 1)
        session.execute(sa.update(AttemptRow).where(*first).values(ended_at=sa.text("'2099-01-01 00:00:00.000000'")))


def finished_before_it_started(quiet: Quiet) -> None:
    quiet.unwatched(finished_at=quiet.job().queued_at, queued_at=quiet.job().finished_at)


def miscounted(quiet: Quiet) -> None:
    with quiet.db.write() as session:
        session.execute(sa.update(JobCountRow).where(JobCountRow.state == "succeeded").values(n=JobCountRow.n + 1))


def told_twice(quiet: Quiet) -> None:
    quiet.logs["w2"] = quiet.logs["w1"].replace("attempt=1", "attempt=3")


def ended_by_itself(quiet: Quiet) -> None:
    quiet.deaths.append("w1 ended by itself, exit 1")


def surprised(quiet: Quiet) -> None:
    quiet.logs["w1"] += "Traceback (most recent call last):\n  File x, line 1\nKeyError: 'x'\n"


@pytest.mark.parametrize(
    ("breach", "check"),
    [
        (left_waiting, "every_job_has_ended"),
        (half_submitted, "every_submission_is_in_once_and_whole"),
        (submitted_twice, "every_submission_is_in_once_and_whole"),
        (accepted_and_gone, "every_submission_is_in_once_and_whole"),
        (broken_off_and_there, "every_submission_is_in_once_and_whole"),
        (moved_unaccepted, "what_is_not_in_never_moves"),
        (failed, "what_nobody_cancelled_succeeded"),
        (other_bytes, "pictures_are_what_sql_says"),
        (picture_lost, "pictures_are_what_sql_says"),
        (other_colour, "pictures_are_what_sql_says"),
        (other_size, "pictures_are_what_sql_says"),
        (another_jobs_picture, "pictures_are_what_sql_says"),
        (another_attempts_picture, "pictures_are_what_sql_says"),
        (orphan, "nothing_else_lies_in_the_bucket"),
        (checkpoint_left, "nothing_else_lies_in_the_bucket"),
        (manifest_lost, "manifests_say_how_their_batches_ended"),
        (manifest_of_another_batch, "manifests_say_how_their_batches_ended"),
        (moved_on_after_the_end, "moves_are_legal_and_in_order"),
        (written_to_after_the_end, "moves_are_legal_and_in_order"),
        (attempt_without_a_claim, "moves_are_legal_and_in_order"),
        (state_behind_the_moves, "moves_are_legal_and_in_order"),
        (attempt_without_a_row, "every_attempt_ended_once"),
        (attempt_that_ended_before_the_last, "every_attempt_ended_once"),
        (attempts_at_the_same_time, "every_attempt_ended_once"),
        (finished_before_it_started, "times_are_in_order"),
        (miscounted, "counts_are_what_can_be_counted"),
        (told_twice, "logs_tell_each_ending_once"),
        (ended_by_itself, "nobody_was_surprised"),
        (surprised, "nobody_was_surprised"),
    ],
)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_each_breach_is_told_by_its_check(quiet: Quiet, breach: Callable[[Quiet], None], check: str) -> None:
    breach(quiet)
    assert check in quiet.found()


def test_a_story_holds_all_that_is_known_of_a_job_and_nothing_of_its_neighbours(quiet: Quiet) -> None:
    job = quiet.job(1)
    quiet.logs["w2"] = f"about {job.id}\nabout {job.id}2\n"
    evidence = verify.Evidence.gather(quiet.db, quiet.storage, quiet.journal, quiet.ordered, quiet.logs, [])
    story = evidence.story(job.id)
    assert "pending -> queued" in story
    assert "running -> succeeded attempt 2 -> 2" in story
    assert story.count("handed_back") == 1
    assert f"about {job.id}\n" in story
    assert f"{job.id}2" not in story
    assert f"object   {job.image_key}" in story


def test_a_chained_traceback_is_one_and_its_last_line_names_it() -> None:
    log = (
        "2026-11-23 01:00:00 WARNING x\n"
        "Traceback (most recent call last):\n  File a\nredis.exceptions.ConnectionError: gone\n"
        "\nThe above exception was the direct cause of the following exception:\n\n"
        "Traceback (most recent call last):\n  File b\nfarm.errors.BrokerUnavailable: away\nand a line of its\n"
        "2026-11-23 01:00:00 WARNING y\n"
    )
    (trace,) = verify.tracebacks(log)
    assert verify.raised(trace) == "farm.errors.BrokerUnavailable"


def test_an_order_is_the_same_for_the_same_seed() -> None:
    assert order(1, "a", SCALE) == order(1, "a", SCALE)
    assert order(1, "a", SCALE) != order(2, "a", SCALE)
    assert Scale.loads(SCALE.dumps()) == SCALE
    assert replace(SCALE, batch=(1, 3)) == SCALE.small

"""The artifacts of a finished job: workers of this release store the list, and for older releases it is derived."""

import pytest
import sqlalchemy as sa

from farm.jobs.database import Database
from farm.jobs.records import Artifact, Claim, JobInfo, Picture, Role
from farm.jobs.schema import ArtifactRow, JobRow
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.show.json_forms import job_json
from farm.specs.spec import RenderSpec

PICTURE = Picture("b/1.png", "f" * 64, 123, 64, 48, "e" * 64, 1.5, ("cut off",), device_seconds=0.75)
IMAGE = Artifact(Role.IMAGE, "b/1.png", "image/png", sha256="f" * 64, bytes=123, width=64, height=48)
STRIP = Artifact(Role.FILM_STRIP, "b/1.trajectory.png", "image/png", sha256="a" * 64, bytes=7, width=640, height=48)
ANIMATION = Artifact(Role.ANIMATION, "b/1.trajectory.webp", "image/webp", sha256="b" * 64, bytes=9, width=64, height=48)
SPEC = RenderSpec(prompt="a", seed=1, trajectory=True)


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore.over(database, Settings(database_url="", broker_url="", s3_bucket=""))


def claimed(store: JobStore, spec: RenderSpec = SPEC) -> Claim:
    store.submissions.submit("batch", "me", 50, [spec])
    (bell,) = store.backlog.enqueue(1).queued
    claim = store.leases.claim(bell.job_id, "w1@host")
    assert claim is not None
    return claim


def succeeded(store: JobStore, spec: RenderSpec = SPEC) -> JobInfo:
    claim = claimed(store, spec)
    assert store.attempts.succeed(claim, PICTURE, [ANIMATION, STRIP] if spec.trajectory else ())
    return store.queries.job(claim.job_id)


def test_a_finished_job_lists_its_picture_first_and_what_lies_beside_it(store: JobStore) -> None:
    job = succeeded(store)
    assert (job.picture, job.artifacts) == (PICTURE, (IMAGE, ANIMATION, STRIP))
    assert store.queries.jobs(job.batch_id) == store.queries.finished(job.batch_id) == [job]


def test_a_job_that_has_not_succeeded_has_no_artifacts(store: JobStore) -> None:
    claim = claimed(store)
    assert (store.queries.job(claim.job_id).picture, store.queries.job(claim.job_id).artifacts) == (None, ())
    assert store.attempts.stopped(claim)
    assert store.queries.job(claim.job_id).artifacts == ()


def test_a_success_that_comes_too_late_lists_nothing(store: JobStore, database: Database) -> None:
    claim = claimed(store)
    assert store.attempts.hand_back(claim)
    assert not store.attempts.succeed(claim, PICTURE, [STRIP])
    with database.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(ArtifactRow)) == 0


def test_a_success_reported_twice_is_listed_once(store: JobStore) -> None:
    claim = claimed(store)
    assert store.attempts.succeed(claim, PICTURE, [STRIP])
    assert store.attempts.succeed(claim, PICTURE, [STRIP])
    assert store.queries.job(claim.job_id).artifacts == (IMAGE, STRIP)


def test_the_artifacts_of_an_older_release_are_derived_from_the_picture(store: JobStore, database: Database) -> None:
    job = succeeded(store)
    with database.write() as session:
        session.execute(sa.delete(ArtifactRow))  # workers of release 0.1 write no artifact rows
    old = store.queries.job(job.id)
    assert old.picture == PICTURE
    assert old.artifacts == (
        IMAGE,
        Artifact(Role.FILM_STRIP, "b/1.trajectory.png", "image/png"),
        Artifact(Role.ANIMATION, "b/1.trajectory.webp", "image/webp"),
    )
    assert [artifact["key"] for artifact in job_json(old)["artifacts"]] == [each.key for each in old.artifacts]


def test_programs_of_an_older_release_find_the_picture_where_they_look(store: JobStore, database: Database) -> None:
    job = succeeded(store)
    columns = (JobRow.image_key, JobRow.image_sha256, JobRow.image_bytes, JobRow.width, JobRow.height)
    with database.read() as session:
        row = session.execute(sa.select(*columns, JobRow.model_sha256, JobRow.render_seconds, JobRow.warnings)).one()
    assert tuple(row) == ("b/1.png", "f" * 64, 123, 64, 48, "e" * 64, 1.5, ["cut off"])
    assert job.state is JobState.SUCCEEDED


def test_a_fact_that_only_a_later_release_knows_is_left_out(store: JobStore, database: Database) -> None:
    job = succeeded(store)
    with database.write() as session:
        session.execute(
            sa.update(ArtifactRow)
            .where(ArtifactRow.role == Role.IMAGE.value)
            .values(facts={"model_sha256": "e" * 64, "render_seconds": 1.5, "mood": "blue"})
        )
    assert store.queries.job(job.id).picture == Picture("b/1.png", "f" * 64, 123, 64, 48, "e" * 64, 1.5)


def test_every_fact_about_a_picture_is_in_its_json_and_in_the_manifest(store: JobStore) -> None:
    job = succeeded(store)
    assert job_json(job)["picture"] == vars(PICTURE)
    (entry,) = store.endings.entries(job.batch_id)
    known = {name: value for name, value in vars(PICTURE).items() if value is not None}
    for name, value in known.items():
        written = "seconds" if name == "render_seconds" else name
        assert entry[written] == (list(value) if isinstance(value, tuple) else value)


def test_a_copy_has_the_artifacts_of_its_source_under_keys_of_its_own(store: JobStore) -> None:
    source = succeeded(store)
    batch_id = store.submissions.submit("again", "me", 50, [SPEC])
    (copying,) = store.reuse.begin_copies({f"{batch_id}-1": source.id})
    assert store.reuse.record_copies([copying]) == []
    copy = store.queries.job(f"{batch_id}-1")
    assert [(each.role, each.sha256) for each in copy.artifacts] == [
        (each.role, each.sha256) for each in source.artifacts
    ]
    stem = f"{batch_id}/00001-a.a1"
    assert [each.key for each in copy.artifacts] == [
        f"{stem}.png",
        f"{stem}.trajectory.webp",
        f"{stem}.trajectory.png",
    ]
    assert copying.keys == {one.key: other.key for one, other in zip(source.artifacts, copy.artifacts, strict=True)}


def test_artifacts_go_with_their_batch(store: JobStore, database: Database) -> None:
    job = succeeded(store)
    store.deletions.mark(job.batch_id)
    store.deletions.delete_rows(job.batch_id)
    with database.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(ArtifactRow)) == 0

"""Estimated device time of a submission, from measured renders, on both kinds of database."""

import pytest
import sqlalchemy as sa

from farm.jobs.database import Database, now
from farm.jobs.estimates import dry_run, speeds
from farm.jobs.records import WorkerInfo
from farm.jobs.schema import JobRow
from farm.jobs.served_models import ServedModel
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.guidance import Guidance
from farm.specs.spec import RenderSpec


@pytest.fixture
def store(database: Database) -> JobStore:
    url = database.url.render_as_string(hide_password=False)
    return JobStore.over(database, Settings(database_url=url, broker_url="redis://nowhere", s3_bucket="b"))


def serve(store: JobStore, *models: ServedModel) -> None:
    store.workers.register(WorkerInfo("w1@host", "cpu", "float32", 4, "1", models))


def rendered(store: JobStore, database: Database, spec: RenderSpec, **values: object) -> None:
    batch = store.submissions.submit("done", "me", 50, [spec])
    with database.write() as session:
        session.execute(
            sa.update(JobRow)
            .where(JobRow.batch_id == batch)
            .values(state="succeeded", finished_at=now(), **{"width": 64, "height": 64, **values})
        )


def test_nothing_rendered_is_nothing_known(store: JobStore, database: Database) -> None:
    store.submissions.submit("waiting", "me", 50, [RenderSpec(prompt="a")])
    assert speeds(database) == {}
    found = dry_run([RenderSpec(prompt=str(n)) for n in range(12)], {})
    assert (found.count, len(found.first), found.device_seconds, found.unmeasured) == (12, 10, None, ("tiny",))


def test_seconds_go_by_steps_pixels_and_guidance(store: JobStore, database: Database) -> None:
    serve(store, ServedModel("tiny", guidance=Guidance("guidance_scale")))
    rendered(store, database, RenderSpec(prompt="a", num_inference_steps=10), device_seconds=2.0, render_seconds=20.0)
    rendered(store, database, RenderSpec(prompt="a", num_inference_steps=30), device_seconds=6.0, render_seconds=60.0)
    known = speeds(database)

    def seconds(**fields: object) -> float | None:
        return dry_run([RenderSpec(prompt="a", **fields)], known).device_seconds

    assert seconds(num_inference_steps=10) == pytest.approx(2)
    assert seconds(num_inference_steps=100) == pytest.approx(20)
    assert seconds(num_inference_steps=10, width=128, height=128) == pytest.approx(8)
    assert seconds(num_inference_steps=10, guidance_scale=1) == pytest.approx(1)


def test_the_guidance_scale_of_flux_changes_no_estimate_and_its_true_cfg_scale_doubles_it(
    store: JobStore, database: Database
) -> None:
    flux = Guidance("true_cfg_scale", requires="negative_prompt")
    serve(store, ServedModel("tiny", guidance=flux))
    rendered(store, database, RenderSpec(prompt="a", num_inference_steps=10), device_seconds=2.0)
    known = speeds(database)

    def seconds(**fields: object) -> float | None:
        return dry_run([RenderSpec(prompt="a", num_inference_steps=10, **fields)], known).device_seconds

    assert [seconds(guidance_scale=scale) for scale in (0.0, 1.0, 5.0)] == pytest.approx([2, 2, 2])
    assert seconds(true_cfg_scale=4.0) == pytest.approx(2)
    assert seconds(true_cfg_scale=4.0, negative_prompt="low") == pytest.approx(4)


def test_without_a_worker_that_tells_its_guidance_the_average_is_taken(store: JobStore, database: Database) -> None:
    serve(store, ServedModel("tiny"))
    for scale, seconds in ((5.0, 4.0), (1.0, 2.0)):
        rendered(
            store,
            database,
            RenderSpec(prompt="a", num_inference_steps=10, guidance_scale=scale),
            device_seconds=seconds,
        )
    spec = RenderSpec(prompt="a", num_inference_steps=10)
    assert dry_run([spec], speeds(database)).device_seconds == pytest.approx(3)


def test_a_render_that_shared_its_device_counts_whole_when_its_share_is_not_known(
    store: JobStore, database: Database
) -> None:
    rendered(store, database, RenderSpec(prompt="a", num_inference_steps=10), render_seconds=3.0)
    assert dry_run([RenderSpec(prompt="a", num_inference_steps=10)], speeds(database)).device_seconds == pytest.approx(
        3
    )


def test_models_are_told_apart_and_have_their_own_size(store: JobStore, database: Database) -> None:
    own = RenderSpec(prompt="a", model="big", num_inference_steps=10)
    rendered(store, database, own, device_seconds=5.0, width=1024, height=1024)
    rendered(
        store,
        database,
        own.model_copy(update={"width": 512, "height": 512}),
        device_seconds=1.25,
        width=512,
        height=512,
    )
    rendered(store, database, RenderSpec(prompt="a", num_inference_steps=10), device_seconds=0.5)
    known = speeds(database)
    assert (known["big"].width, known["big"].height) == (1024, 1024)
    tiny = RenderSpec(prompt="a", num_inference_steps=10)
    found = dry_run([own, tiny, RenderSpec(prompt="a", model="new")], known)
    assert found.device_seconds == pytest.approx(5.5)
    assert found.unmeasured == ("new",)

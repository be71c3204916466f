"""Jobs that are too large for every live worker wait, with the reason, until a worker allows their size."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from farm.jobs.database import Database
from farm.jobs.records import WorkerInfo
from farm.jobs.schema import WorkerRow
from farm.jobs.served_models import MemoryLimit, ServedModel
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.guidance import UNGUIDED, Guidance
from farm.specs.spec import RenderSpec

SETTINGS = Settings.load(database_url="sqlite://", broker_url="redis://", s3_bucket="farm")
SD = Guidance("guidance_scale")
FLUX = Guidance("true_cfg_scale", requires="negative_prompt")
LIMIT = MemoryLimit(2 * 512 * 512, 2, SD)


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore.over(database, SETTINGS)


def worker(name: str, limit: MemoryLimit | None, *, model: str = "tiny") -> WorkerInfo:
    return WorkerInfo(name, "cpu", "float32", 4, "1", (ServedModel(model, limit=limit, guidance=SD),))


def spec(width: int | None, height: int | None, guidance_scale: float = 5.0, **fields: object) -> RenderSpec:
    return RenderSpec.parse(
        {"prompt": "x", "width": width, "height": height, "guidance_scale": guidance_scale, **fields}
    )


def queued(store: JobStore) -> list[str]:
    return [bell.job_id.rpartition("-")[2] for bell in store.backlog.enqueue(10).queued]


def test_a_job_that_no_worker_has_the_memory_for_waits_and_smaller_ones_pass_it(store: JobStore) -> None:
    store.workers.register(worker("w1", LIMIT))
    sizes = [spec(1024, 1024), spec(512, 512), spec(512, 1024), spec(512, 1024, 1.0), spec(None, None)]
    batch_id = store.submissions.submit("b", "me", 50, sizes)
    assert queued(store) == ["2", "4", "5"]
    assert queued(store) == []
    assert store.overview.too_large(batch_id) == store.overview.too_large() == {"tiny": LIMIT}


def test_a_large_job_is_queued_once_a_worker_allows_it_or_has_no_limit(store: JobStore) -> None:
    store.workers.register(worker("w1", LIMIT))
    store.submissions.submit("b", "me", 50, [spec(1024, 1024), spec(4096, 4096)])
    assert queued(store) == []
    store.workers.register(worker("w2", MemoryLimit(2 * 1024 * 1024, 2, SD)))
    assert queued(store) == ["1"]
    store.workers.register(worker("w3", None))
    assert queued(store) == ["2"]
    assert store.overview.too_large() == {}


def test_a_worker_that_is_gone_allows_nothing(store: JobStore, database: Database) -> None:
    store.workers.register(worker("w1", LIMIT))
    store.workers.register(worker("w2", None))
    store.submissions.submit("b", "me", 50, [spec(1024, 1024)])
    assert store.overview.too_large() == {}
    with database.write() as session:
        long_ago = datetime(2000, 1, 1, tzinfo=UTC)
        session.execute(sa.update(WorkerRow).where(WorkerRow.name == "w2").values(seen_at=long_ago))
    assert store.overview.too_large() == {"tiny": LIMIT}
    assert queued(store) == []


def test_other_batches_and_models_are_not_concerned(store: JobStore) -> None:
    store.workers.register(worker("w1", LIMIT))
    store.workers.register(worker("w2", LIMIT, model="other"))
    store.submissions.submit("large", "me", 50, [spec(1024, 1024)])
    small = store.submissions.submit("small", "me", 50, [spec(512, 512)])
    assert store.overview.too_large(small) == {}
    assert store.overview.too_large() == {"tiny": LIMIT}


def test_a_worker_can_find_its_limit_later(store: JobStore) -> None:
    store.workers.register(worker("w1", None))
    store.submissions.submit("b", "me", 50, [spec(1024, 1024)])
    store.workers.describe(worker("w1", LIMIT))
    assert queued(store) == []


@pytest.mark.parametrize(("factor", "fit"), [(0, []), (1, ["2"]), (2, ["1", "2"])])
def test_a_picture_of_its_models_own_size_goes_if_its_factor_is_allowed(
    store: JobStore, factor: int, fit: list[str]
) -> None:
    limit = replace(LIMIT, native_factor=factor)
    store.workers.register(worker("w1", limit))
    specs = [spec(None, None), spec(None, None, 1.0)]
    batch_id = store.submissions.submit("b", "me", 50, specs)
    assert [str(place) for place, each in enumerate(specs, 1) if limit.allows(each)] == fit
    assert queued(store) == fit
    assert store.overview.too_large(batch_id) == ({} if factor == 2 else {"tiny": limit})


@pytest.mark.parametrize("guidance", [SD, FLUX, UNGUIDED, Guidance("a_field_of_a_later_release")])
def test_the_database_decides_as_the_worker_does(store: JobStore, guidance: Guidance) -> None:
    limit = MemoryLimit(512 * 512, 1, guidance)
    specs = [
        spec(side, side, guidance_scale, true_cfg_scale=true_cfg, negative_prompt=negative)
        for side in (None, 256, 512, 576)
        for guidance_scale in (1.0, 5.0)
        for true_cfg in (1.0, 4.0)
        for negative in ("", "low")
    ] + [spec(64, None)]
    store.workers.register(worker("w1", limit))
    store.submissions.submit("b", "me", 50, specs)
    allowed = [str(place) for place, each in enumerate(specs, 1) if limit.allows(each)]
    assert [bell.job_id.rpartition("-")[2] for bell in store.backlog.enqueue(len(specs)).queued] == allowed
    assert 0 < len(allowed) < len(specs)


def test_the_guidance_scale_of_flux_changes_nothing_and_its_true_cfg_scale_doubles_the_memory(store: JobStore) -> None:
    store.workers.register(worker("w1", MemoryLimit(512 * 512, 1, FLUX)))
    guided = {"true_cfg_scale": 4.0, "negative_prompt": "low"}
    unguided = [spec(512, 512, 5.0), spec(512, 512, 1.0), spec(512, 1024, 5.0), spec(512, 1024, 0.5)]
    others = [spec(512, 512, **guided), spec(512, 256, **guided), spec(512, 512, true_cfg_scale=4.0)]
    store.submissions.submit("b", "me", 50, unguided + others)
    assert queued(store) == ["1", "2", "6", "7"]


def test_workers_that_count_differently_each_allow_what_fits_there(store: JobStore) -> None:
    store.workers.register(worker("this release", MemoryLimit(512 * 512, 1, FLUX)))
    store.workers.register(worker("the one before", MemoryLimit(512 * 512, 1, SD)))
    store.submissions.submit(
        "b", "me", 50, [spec(512, 512), spec(512, 512, 1.0, true_cfg_scale=4.0, negative_prompt="low")]
    )
    assert queued(store) == ["1", "2"]

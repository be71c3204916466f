"""Jobs that are too large for the workers that are there: they wait, with the reason, and go when one has room."""

from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from farm.jobs.database import Database
from farm.jobs.memory import MOST, OWN_ROWS, Room
from farm.jobs.records import WorkerInfo
from farm.jobs.schema import WorkerRow
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.spec import RenderSpec

SETTINGS = Settings.load(database_url="sqlite://", broker_url="redis://", s3_bucket="farm")
ROOM = 2 * 512 * 512


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore.over(database, SETTINGS)


def worker(name: str, most: int | None, *, model: str = "tiny") -> WorkerInfo:
    return WorkerInfo(name, "cpu", "float32", 4, "1", ({"name": model, MOST: most} if most else {"name": model},))


def spec(width: int | None, height: int | None, guidance_scale: float = 5.0) -> RenderSpec:
    return RenderSpec(prompt="x", width=width, height=height, guidance_scale=guidance_scale)


def queued(store: JobStore) -> list[str]:
    return [bell.job_id.rpartition("-")[2] for bell in store.backlog.enqueue(10)]


def test_what_no_worker_has_room_for_waits_and_what_one_has_passes_it(store: JobStore) -> None:
    store.workers.register(worker("w1", ROOM))
    sizes = [spec(1024, 1024), spec(512, 512), spec(512, 1024), spec(512, 1024, 1.0), spec(None, None)]
    batch_id = store.submissions.submit("b", "me", 50, sizes)
    assert queued(store) == ["2", "4", "5"]
    assert queued(store) == []
    assert store.overview.too_large(batch_id) == store.overview.too_large() == {"tiny": ROOM}


def test_it_goes_when_a_worker_comes_that_has_room_or_has_not_found_out(store: JobStore) -> None:
    store.workers.register(worker("w1", ROOM))
    store.submissions.submit("b", "me", 50, [spec(1024, 1024), spec(4096, 4096)])
    assert queued(store) == []
    store.workers.register(worker("w2", 2 * 1024 * 1024))
    assert queued(store) == ["1"]
    store.workers.register(worker("w3", None))
    assert queued(store) == ["2"]
    assert store.overview.too_large() == {}


def test_a_worker_that_is_gone_has_room_for_nothing(store: JobStore, database: Database) -> None:
    store.workers.register(worker("w1", ROOM))
    store.workers.register(worker("w2", None))
    store.submissions.submit("b", "me", 50, [spec(1024, 1024)])
    assert store.overview.too_large() == {}
    with database.write() as session:
        long_ago = datetime(2000, 1, 1, tzinfo=UTC)
        session.execute(sa.update(WorkerRow).where(WorkerRow.name == "w2").values(seen_at=long_ago))
    assert store.overview.too_large() == {"tiny": ROOM}
    assert queued(store) == []


def test_other_batches_and_models_are_none_of_it(store: JobStore) -> None:
    store.workers.register(worker("w1", ROOM))
    store.workers.register(worker("w2", ROOM, model="other"))
    store.submissions.submit("large", "me", 50, [spec(1024, 1024)])
    small = store.submissions.submit("small", "me", 50, [spec(512, 512)])
    assert store.overview.too_large(small) == {}
    assert store.overview.too_large() == {"tiny": ROOM}


def test_a_worker_can_find_out_later(store: JobStore) -> None:
    store.workers.register(worker("w1", None))
    store.submissions.submit("b", "me", 50, [spec(1024, 1024)])
    store.workers.describe(worker("w1", ROOM))
    assert queued(store) == []


@pytest.mark.parametrize(("rows", "fit"), [(0, []), (1, ["2"]), (2, ["1", "2"])])
def test_a_picture_of_its_models_own_size_goes_where_so_many_rows_of_that_fit(
    store: JobStore, rows: int, fit: list[str]
) -> None:
    described = {"name": "tiny", MOST: ROOM, OWN_ROWS: rows}
    store.workers.register(WorkerInfo("w1", "cpu", "float32", 4, "1", (described,)))
    specs = [spec(None, None), spec(None, None, 1.0)]
    batch_id = store.submissions.submit("b", "me", 50, specs)
    assert [str(place) for place, each in enumerate(specs, 1) if Room(ROOM, rows).has(each)] == fit
    assert queued(store) == fit
    assert store.overview.too_large(batch_id) == ({} if rows == 2 else {"tiny": ROOM})


def test_where_only_one_side_is_given_only_the_worker_can_tell(store: JobStore) -> None:
    store.workers.register(WorkerInfo("w1", "cpu", "float32", 4, "1", ({"name": "tiny", MOST: 64, OWN_ROWS: 0},)))
    store.submissions.submit("b", "me", 50, [spec(64, None)])
    assert Room(64, 0).has(spec(64, None))
    assert queued(store) == ["1"]

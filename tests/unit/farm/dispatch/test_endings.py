"""Batches that have ended: their manifests, and their deletion, on request or after the retention time."""

import json
import threading
from typing import Any

import pytest

from farm.dispatch import deletion, retention
from farm.dispatch.deletion import Deletion
from farm.dispatch.manifests import Manifests
from farm.dispatch.retention import Retention
from farm.errors import ErrorClass, NotFound, StorageUnavailable
from farm.jobs.states import JobState
from farm.specs.object_keys import manifest_key
from tests.unit.farm.dispatch.conftest import WORKER, Parts

DAY_SECONDS = 24 * 3600


def ended_batch(parts: Parts, name: str = "batch", jobs: int = 1) -> str:
    """Return a batch whose jobs have succeeded."""
    ids = parts.submit(jobs, name)
    for job in ids:
        parts.succeed(job)
    return ids[0].rpartition("-")[0]


def keys(parts: Parts, batch_id: str) -> list[str]:
    """Return the keys of a batch's objects."""
    return list(parts.storage.keys(f"{batch_id}/"))


# --- manifests ----------------------------------------------------------------------------------------------------


@pytest.fixture
def manifests(parts: Parts) -> Manifests:
    return Manifests(parts.store.endings, parts.storage)


def test_a_manifest_is_written_once_its_batch_has_ended(parts: Parts, manifests: Manifests) -> None:
    done, last = parts.submit(2)
    batch_id = done.rpartition("-")[0]
    parts.succeed(done)
    assert not manifests.write(batch_id)
    assert manifest_key(batch_id) not in keys(parts, batch_id)
    parts.store.steering.cancel(job_id=last)
    assert manifests.write(batch_id)
    lines = [json.loads(line) for line in parts.storage.lines(manifest_key(batch_id))]
    assert [(line["id"], line["state"]) for line in lines] == [(done, "succeeded"), (last, "cancelled")]
    assert lines == list(manifests.read(batch_id))


def test_a_manifest_of_no_batch_is_not_written(manifests: Manifests) -> None:
    assert not manifests.write("no-such-batch")


def test_a_batch_that_goes_on_while_its_manifest_is_written_has_none(
    parts: Parts, manifests: Manifests, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = parts.submit(1)
    batch_id = job.rpartition("-")[0]
    claim = parts.claim(job)
    assert parts.store.attempts.fail(claim, "broken", ErrorClass.BAD_INPUT)
    put = parts.storage.put_stream

    def retried_meanwhile(*arguments: Any) -> None:
        put(*arguments)
        assert parts.store.steering.retry(job_id=job) == 1

    monkeypatch.setattr(parts.storage, "put_stream", retried_meanwhile)
    assert not manifests.write(batch_id)
    assert not parts.store.endings.noted(batch_id)
    assert [entry["state"] for entry in manifests.read(batch_id)] == ["pending"], "read from SQL, not from the bucket"


def test_a_manifest_is_read_from_sql_before_it_is_written(parts: Parts, manifests: Manifests) -> None:
    parts.submit(2)
    batch_id = parts.store.queries.batch("batch").id
    assert [entry["state"] for entry in manifests.read(batch_id)] == ["pending"] * 2


def test_a_manifest_that_is_gone_from_the_bucket_is_read_from_sql(
    parts: Parts, manifests: Manifests, caplog: pytest.LogCaptureFixture
) -> None:
    batch_id = ended_batch(parts)
    assert manifests.write(batch_id)
    parts.storage.delete(manifest_key(batch_id))
    assert [entry["state"] for entry in manifests.read(batch_id)] == ["succeeded"]
    assert f"the manifest of batch_id={batch_id} is gone" in caplog.text


def test_a_manifest_is_written_again_where_the_object_store_was_away(parts: Parts, manifests: Manifests) -> None:
    batch_id = ended_batch(parts)
    parts.storage.away = True
    with pytest.raises(StorageUnavailable):
        manifests.write(batch_id)
    parts.storage.away = False
    assert not parts.store.endings.noted(batch_id)
    assert manifests.write(batch_id)


def test_what_an_interrupted_manifest_left_in_the_bucket_is_aborted(parts: Parts, manifests: Manifests) -> None:
    batch_id = ended_batch(parts)
    key, s3, bucket = manifest_key(batch_id), parts.storage._s3, parts.storage.bucket
    s3.create_multipart_upload(Bucket=bucket, Key=key)
    assert s3.list_multipart_uploads(Bucket=bucket, Prefix=key).get("Uploads")
    assert manifests.write(batch_id)
    assert not s3.list_multipart_uploads(Bucket=bucket, Prefix=key).get("Uploads")


# --- deletion -----------------------------------------------------------------------------------------------------


@pytest.fixture
def deletions(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> Deletion:
    monkeypatch.setattr(deletion, "_REST_SECONDS", 0.0)
    return Deletion(parts.store.deletions, parts.storage)


def test_a_batch_is_deleted_with_its_objects_and_no_other_is(parts: Parts, deletions: Deletion) -> None:
    batch_id, other = ended_batch(parts), ended_batch(parts, "other")
    parts.storage.put(f"{batch_id}-2/not-its-own", b"x")
    parts.store.deletions.mark(batch_id)
    assert deletions.delete(batch_id)
    assert keys(parts, batch_id) == []
    assert len(list(parts.storage.keys())) == 2
    assert parts.store.deletions.marked() == []
    assert parts.store.queries.batch(other).done
    with pytest.raises(NotFound):
        parts.store.queries.batch(batch_id)


def test_objects_are_deleted_before_rows_and_a_part_at_a_time(
    parts: Parts, deletions: Deletion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletion, "_OBJECTS", 2)
    batch_id = ended_batch(parts, jobs=3)
    parts.store.deletions.mark(batch_id)
    assert not deletions.delete_some(batch_id)
    assert len(keys(parts, batch_id)) == 1
    assert parts.store.deletions.marked() == [batch_id]
    assert deletions.delete_some(batch_id)
    assert parts.store.deletions.marked() == []


def test_rows_are_deleted_a_part_at_a_time(parts: Parts, deletions: Deletion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletion, "_PIECES", 1)
    parts.submit(1500)
    batch_id = parts.store.queries.batch("batch").id
    parts.store.deletions.mark(batch_id, cancel=True)
    assert not deletions.delete_some(batch_id)
    assert parts.store.deletions.marked() == [batch_id]
    assert deletions.delete_some(batch_id)


def test_a_batch_with_a_running_job_is_left_to_the_dispatcher(parts: Parts, deletions: Deletion) -> None:
    (job,) = parts.submit(1)
    batch_id = job.rpartition("-")[0]
    claim = parts.claim(job)
    parts.store.deletions.mark(batch_id, cancel=True)
    assert not deletions.delete(batch_id)
    assert parts.store.leases.beat(WORKER.name, {}).cancelled == frozenset()
    assert parts.store.attempts.stopped(claim)
    assert deletions.delete(batch_id)


def test_a_deletion_that_the_object_store_interrupts_is_gone_on_with(parts: Parts, deletions: Deletion) -> None:
    batch_id = ended_batch(parts)
    parts.store.deletions.mark(batch_id)
    parts.storage.away = True
    with pytest.raises(StorageUnavailable):
        deletions.delete(batch_id)
    assert parts.store.deletions.marked() == [batch_id]
    parts.storage.away = False
    assert deletions.delete(batch_id)


# --- retention ----------------------------------------------------------------------------------------------------


def turns(parts: Parts, **settings: Any) -> Retention:
    return Retention(parts.store, parts.storage, parts.settings.model_copy(update=settings))


def test_a_turn_notes_what_has_ended_and_deletes_nothing(parts: Parts) -> None:
    batch_id = ended_batch(parts)
    assert not turns(parts).turn()
    assert parts.store.endings.noted(batch_id)
    assert len(keys(parts, batch_id)) == 2


def test_a_full_turn_asks_for_another(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "_BATCHES", 2)
    noted = [ended_batch(parts, f"batch {n}") for n in range(3)]
    retained = turns(parts)
    assert retained.turn()
    assert [parts.store.endings.noted(batch_id) for batch_id in noted].count(True) == 2
    assert not retained.turn()
    assert all(parts.store.endings.noted(batch_id) for batch_id in noted)


@pytest.mark.parametrize("days", [None, 0])
def test_without_retention_days_batches_are_kept(parts: Parts, days: float | None) -> None:
    batch_id = ended_batch(parts)
    retained = turns(parts, retention_days=days)
    retained.turn()
    parts.shift_batch_end(batch_id, -1000 * DAY_SECONDS)
    assert not retained.turn()
    assert parts.store.queries.batch(batch_id).done


def test_a_batch_that_ended_too_many_days_ago_is_deleted(parts: Parts) -> None:
    old, young = ended_batch(parts, "old"), ended_batch(parts, "young")
    retained = turns(parts, retention_days=2)
    assert not retained.turn()
    parts.shift_batch_end(old, -2 * DAY_SECONDS - 60)
    parts.shift_batch_end(young, -2 * DAY_SECONDS + 60)
    assert retained.turn()
    assert keys(parts, old) == []
    assert len(keys(parts, young)) == 2
    assert not retained.turn()


def test_a_given_up_batch_waits_for_its_workers(parts: Parts) -> None:
    (job,) = parts.submit(1)
    batch_id = job.rpartition("-")[0]
    claim = parts.claim(job)
    parts.store.deletions.mark(batch_id, cancel=True)
    retained = turns(parts)
    assert not retained.turn()
    assert parts.store.deletions.marked() == [batch_id]
    assert parts.store.attempts.stopped(claim)
    assert retained.turn()
    assert parts.store.deletions.marked() == []


def test_a_turn_ends_between_two_batches_when_it_is_told_to_stop(parts: Parts) -> None:
    batch_id = ended_batch(parts)
    given_up = ended_batch(parts, "given up")
    parts.store.deletions.mark(given_up)
    stop = threading.Event()
    stop.set()
    assert not turns(parts).turn(stop)
    assert not parts.store.endings.noted(batch_id)
    assert parts.store.deletions.marked() == [given_up]


def test_a_turn_goes_on_where_the_object_store_interrupted_the_one_before(parts: Parts) -> None:
    batch_id = ended_batch(parts)
    retained = turns(parts)
    parts.storage.away = True
    with pytest.raises(StorageUnavailable):
        retained.turn()
    parts.storage.away = False
    retained.turn()
    assert parts.store.endings.noted(batch_id)
    assert parts.store.queries.batch(batch_id).counts[JobState.SUCCEEDED] == 1

"""Ended batches on a real database and S3: manifests, downloads, archives, deletion and retention."""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa
from PIL import Image

from farm.client.batch import Batch
from farm.client.farm import Farm
from farm.dispatch.retention import Retention
from farm.errors import ErrorClass, NotEnded, NotFound, StorageUnavailable
from farm.jobs.database import Database, now_plus
from farm.jobs.records import Picture
from farm.jobs.schema import BatchRow, JobRow
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.settings import Settings
from farm.specs.object_keys import image_key, manifest_key
from tests.integration.conftest import Command, Crew, wait_until
from tests.servers import BOTH_KINDS_IN_TIME


@dataclass
class Stand:
    """A farm in which the test acts as the worker."""

    farm: Farm
    store: JobStore
    storage: Storage
    retention: Retention

    def batch(self, count: int = 3, name: str = "sea") -> Batch:
        """An ended batch: all jobs succeeded except the last, which failed."""
        batch = self.farm.submit([{"prompt": f"prompt {n}", "seed": n} for n in range(count)], name=name)
        self.render(batch, count - 1)
        while not batch.status().done:
            for bell in self.store.backlog.enqueue(99).queued:
                assert bell.job_id
            claim = self.store.leases.claim(f"{batch.id}-{count}", "w1@host")
            assert claim is not None
            self.store.attempts.fail(claim, "no such sampler", ErrorClass.BAD_INPUT)
        return batch

    def render(self, batch: Batch, last: int, first: int = 1) -> None:
        """Finish these jobs of a batch, each with a different picture."""
        self.store.backlog.enqueue(99)
        for index in range(first, last + 1):
            claim = self.store.leases.claim(f"{batch.id}-{index}", "w1@host")
            assert claim is not None
            data = png(claim.spec.seed)
            key = image_key(claim.batch_id, claim.index, claim.attempt, claim.spec.prompt)
            self.storage.put(key, data)
            sha256 = hashlib.sha256(data).hexdigest()
            assert self.store.attempts.succeed(claim, Picture(key, sha256, len(data), 64, 64, "e" * 64, 0.5))

    def manifest(self, batch: Batch) -> list[dict[str, object]]:
        """The batch's manifest in the bucket."""
        return [json.loads(line) for line in self.storage.lines(manifest_key(batch.id))]


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (seed % 256, 30, 30)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def stand(settings: Settings, database: Database) -> Iterator[Stand]:
    storage, store = Storage(settings), JobStore.over(database, settings)
    with Farm(settings) as farm:
        yield Stand(farm, store, storage, Retention(store, storage, settings))
    storage.close()


def test_a_batch_that_has_ended_gets_a_manifest_and_another_one_when_it_ends_again(stand: Stand) -> None:
    batch = stand.batch()
    assert [entry["state"] for entry in batch.manifest()] == ["succeeded", "succeeded", "failed"]  # read from SQL
    with pytest.raises(NotFound):
        stand.manifest(batch)
    assert not stand.retention.turn()
    first = stand.manifest(batch)
    assert first == list(batch.manifest())
    assert (first[2]["error"], first[0]["key"]) == ("no such sampler", next(iter(batch)).picture.key)
    batch.retry()
    stand.retention.turn()
    assert stand.manifest(batch) == first  # unchanged: the batch has not ended
    stand.render(batch, 3, first=3)
    assert [entry["state"] for entry in batch.manifest()] == ["succeeded"] * 3  # from SQL: the stored one is outdated
    stand.retention.turn()
    assert [entry["state"] for entry in stand.manifest(batch)] == ["succeeded"] * 3
    stand.storage.delete(manifest_key(batch.id))
    assert stand.store.endings.unnoted() == []  # written once
    assert len(list(batch.manifest())) == 3


def test_without_an_object_store_manifests_come_later(stand: Stand, settings: Settings) -> None:
    batch = stand.batch()
    away = Storage(settings.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:1"}))
    with pytest.raises(StorageUnavailable):
        Retention(stand.store, away, settings).turn()
    away.close()
    stand.retention.turn()
    assert len(stand.manifest(batch)) == 3


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_an_object_is_written_as_it_comes_whole_or_not_at_all(stand: Stand) -> None:
    def lines(count: int, *, breaks: bool) -> Iterator[bytes]:
        for number in range(count):
            yield b"%099d\n" % number
        if breaks:
            raise ZeroDivisionError

    stand.storage.put_stream("b/large", lines(200_000, breaks=False), "text/plain")  # a multipart upload
    assert sum(1 for _ in stand.storage.lines("b/large")) == 200_000
    assert hashlib.sha256(stand.storage.get("b/large")).digest() == (
        hashlib.sha256(b"".join(lines(200_000, breaks=False))).digest()
    )
    for count in (10, 200_000):
        with pytest.raises(ZeroDivisionError):
            stand.storage.put_stream("b/broken", lines(count, breaks=True), "text/plain")
    assert list(stand.storage.keys()) == ["b/large"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_download_goes_on_where_it_was_and_mends_what_is_not_what_was_rendered(stand: Stand, tmp_path: Path) -> None:
    batch = stand.batch(30)
    paths = batch.download(tmp_path / "out", progress=True)
    assert [path.name[:5] for path in paths] == [f"{n:05d}" for n in range(1, 30)]
    paths[3].unlink()
    paths[5].write_bytes(b"half a pic")
    before = {path: path.stat().st_mtime_ns for path in paths if path.exists()}
    assert batch.download(tmp_path / "out") == paths
    assert {path for path in paths if path.stat().st_mtime_ns != before.get(path)} == {paths[3], paths[5]}
    assert [path.read_bytes() for path in paths] == [png(n) for n in range(29)]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_zip_has_every_picture_and_the_manifest_or_is_not_there(stand: Stand, tmp_path: Path) -> None:
    batch, path = stand.batch(30), tmp_path / "sea.zip"
    assert batch.archive(path, progress=True) == 29
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        *packed, last = file.infolist()
        assert {entry.compress_type for entry in packed} == {zipfile.ZIP_STORED}
        assert [file.read(entry) for entry in packed] == [png(n) for n in range(29)]
        assert last.filename == "manifest.jsonl"
        assert [json.loads(line) for line in file.read(last).splitlines()] == list(batch.manifest())
    before = path.read_bytes()
    stand.storage.put(next(iter(batch)).picture.key, b"other bytes")
    with pytest.raises(StorageUnavailable, match="SHA-256"):
        batch.archive(path)
    assert path.read_bytes() == before
    assert list(tmp_path.glob("*.part")) == []


def left(database: Database) -> set[str]:
    with database.read() as session:
        return set(session.scalars(sa.select(JobRow.batch_id))) | set(session.scalars(sa.select(BatchRow.id)))


def test_a_deleted_batch_is_gone_with_everything_under_its_name_and_no_other_is(
    stand: Stand, database: Database
) -> None:
    other, batch = stand.batch(name="sea"), stand.batch(name="sea")
    stand.retention.turn()
    stand.storage.put(f"{batch.id}/00001.a7.png", b"of an attempt that nobody remembers")
    stand.storage.put(f"{batch.id}-not/1.png", b"of another batch")
    assert batch.delete()
    assert list(stand.storage.keys(f"{batch.id}/")) == []
    assert len(list(stand.storage.keys(f"{other.id}/"))) == 3
    assert list(stand.storage.keys(f"{batch.id}-not/")) != []
    assert left(database) == {other.id}
    assert stand.farm.batch("sea").id == other.id
    with pytest.raises(NotFound):
        batch.status()
    with pytest.raises(NotFound):
        batch.delete()


def test_a_deletion_that_was_interrupted_is_completed(
    stand: Stand, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = stand.batch()

    def away(*_: object) -> None:
        raise StorageUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete_many", away)
        assert not batch.delete()
        with pytest.raises(NotFound):
            stand.farm.batch(batch.id)
        with pytest.raises(StorageUnavailable):
            stand.retention.turn()
    assert left(database) == {batch.id}  # rows are deleted last: they are the only record of the objects
    assert len(list(stand.storage.keys())) == 2
    assert stand.retention.turn()
    assert (left(database), list(stand.storage.keys()), stand.retention.turn()) == (set(), [], False)


def test_batches_go_by_their_age_if_that_is_set(stand: Stand, settings: Settings, database: Database) -> None:
    old, young = stand.batch(), stand.batch()
    stand.retention.turn()
    with database.write() as session:
        long_ago = sa.update(BatchRow).values(ended_at=now_plus(sa.literal(-8 * 24 * 3600.0)))
        session.execute(long_ago.where(BatchRow.id == old.id))
    for days in (None, 0, 9):
        Retention(stand.store, stand.storage, settings.model_copy(update={"retention_days": days})).turn()
    assert left(database) == {old.id, young.id}
    Retention(stand.store, stand.storage, settings.model_copy(update={"retention_days": 7})).turn()
    assert left(database) == {young.id}
    assert list(stand.storage.keys(f"{old.id}/")) == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.long
def test_the_command_line_tells_fetches_and_deletes(stand: Stand, command: Command, tmp_path: Path) -> None:
    batch = stand.batch()
    batch.pause()
    shown = command("status", "sea").stdout
    assert "paused" in shown
    assert "no such sampler" in shown
    said = json.loads(command("status", "sea", "--json").stdout)
    assert (said["paused"], len(said["jobs"]), said["further"]) == (True, 3, False)
    listed = json.loads(command("jobs", "sea", "--after", "1", "--limit", "1", "--json").stdout)
    assert ([job["index"] for job in listed["jobs"]], listed["after"]) == ([2], 2)
    assert command("jobs", "sea", "--state", "failed").stdout == command("jobs", "sea", "--wrong").stdout
    assert command("get", "sea", "--zip", "sea.zip").stdout == "2 pictures and manifest.jsonl in sea.zip\n"
    assert len(zipfile.ZipFile(tmp_path / "sea.zip").namelist()) == 3
    assert command("get", "sea", "--manifest").stdout == "3 files in out\n"
    assert len((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()) == 3
    going_on = stand.farm.submit(["a", "b"], name="going on")
    refused = command("delete", "sea", "going on", "--yes")
    assert refused.returncode == 2
    assert "2 of them not ended" in refused.stdout
    assert "nothing was deleted" in refused.stderr
    assert command("delete", "sea").returncode == 1  # no confirmation
    assert len(stand.farm.batches()) == 2
    done = command("delete", "sea", "going on", "--yes", "--cancel")
    assert done.returncode == 0
    assert f"{batch.id}: 3 jobs, 2 pictures" in done.stdout
    assert f"{going_on.id} deleted\n" in done.stdout
    assert stand.farm.batches() == []
    assert list(stand.storage.keys()) == []


@BOTH_KINDS_IN_TIME
def test_a_batch_that_is_rendered_is_deleted_when_its_workers_have_let_go(
    farm: Farm, crew: Crew, database: Database
) -> None:
    crew.dispatcher()
    crew.worker("w1", "tiny=null:?seconds_per_step=0.05")
    batch = farm.submit([f"prompt {n}" for n in range(40)], num_inference_steps=10)
    wait_until(lambda: batch.status().counts[JobState.SUCCEEDED] >= 4, "some have ended")
    with pytest.raises(NotEnded, match="have not ended"):
        batch.delete()
    assert not batch.delete(cancel=True)
    wait_until(lambda: left(database) == set(), "all of it is gone", 30)
    storage = Storage(farm.settings)
    assert list(storage.keys()) == []
    after = farm.submit("the slots are free again", num_inference_steps=2)
    assert after.wait(30).counts[JobState.SUCCEEDED] == 1
    wait_until(lambda: manifest_key(after.id) in set(storage.keys()), "its manifest is written", 30)
    storage.close()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_parts_of_a_manifest_whose_writer_died_go_when_it_is_written_anew_and_with_the_batch(stand: Stand) -> None:
    def unfinished() -> int:
        return len(stand.storage._s3.list_multipart_uploads(Bucket=stand.storage.bucket).get("Uploads", ()))

    def die_of_it(batch: Batch) -> None:
        place = {"Bucket": stand.storage.bucket, "Key": manifest_key(batch.id)}
        begun = stand.storage._s3.create_multipart_upload(**place)
        stand.storage._s3.upload_part(**place, UploadId=begun["UploadId"], PartNumber=1, Body=b"{}\n" * 2**21)

    batch, other = stand.batch(), stand.batch(name="land")
    die_of_it(batch)
    die_of_it(other)
    assert unfinished() == 2
    stand.retention.turn()
    assert unfinished() == 0
    assert len(stand.manifest(batch)) == batch.total
    die_of_it(batch)
    die_of_it(other)
    assert batch.delete()
    assert unfinished() == 1

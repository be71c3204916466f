"""The doctor, on real servers that are healthy, misconfigured or away."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa

from farm import __version__
from farm.cli.doctor import check, exit_code, line
from farm.client.farm import Farm
from farm.jobs.backlog import Backlog
from farm.jobs.database import Database, now_plus
from farm.jobs.leadership import DISPATCHER, Leadership
from farm.jobs.records import WorkerInfo
from farm.jobs.schema import BatchRow, JobRow, LeaderRow, WorkerRow
from farm.jobs.served_models import MemoryLimit, ServedModel
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.jobs.workers import Workers
from farm.objects.storage import Storage
from farm.runtime.finding import Finding
from farm.settings import Settings
from farm.specs.guidance import UNGUIDED

pytestmark = pytest.mark.usefixtures("no_takeover")


def found(settings: Settings, part: str) -> list[Finding]:
    return [finding for finding in check(settings) if finding.part == part]


def only(settings: Settings, part: str) -> Finding:
    (finding,) = found(settings, part)
    return finding


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Settings with a lease so long that workers count as alive throughout a test."""
    return settings.model_copy(update={"lease_seconds": 600.0})


@pytest.fixture
def on_sqlite(on_sqlite: Settings) -> Settings:
    """Settings of a farm on SQLite with a leading dispatcher, for tests that do not depend on the database."""
    database = Database(on_sqlite.database_url)
    lead(database)
    database.close()
    return on_sqlite


def introduce(store: JobStore, name: str, *, model: str = "tiny", version: str = __version__) -> None:
    store.workers.register(
        WorkerInfo(name=name, device="cpu", dtype="float32", slots=8, version=version, models=(ServedModel(model),))
    )


def test_a_healthy_farm_is_all_ok(settings: Settings, database: Database) -> None:
    lead(database)
    introduce(JobStore.over(database, settings), "worker-1@here")
    findings = list(check(settings))
    assert [(finding.part, finding.level) for finding in findings] == [
        (part, "ok") for part in ("settings", "database", "broker", "storage", "dispatcher", "worker")
    ]
    assert exit_code(findings) == 0
    assert line(findings[-1]).plain == "✓ worker: worker-1@here on cpu, 8 slots, serves tiny"
    storage = Storage(settings)
    assert not list(storage.keys())  # the doctor deleted its probe object
    storage.close()


def test_what_workers_lack_is_named(settings: Settings, database: Database) -> None:
    store = JobStore.over(database, settings)
    with Farm(settings) as farm:
        farm.submit(["a red circle"] * 3, model="sd15")
        farm.submit(["a red circle"], model="tiny")
    introduce(store, "old@here", version="0.0.1")
    introduce(store, "gone@here", model="sd15")
    with database.write() as session:
        seen = session.scalar(sa.select(WorkerRow.seen_at).where(WorkerRow.name == "gone@here"))
        session.execute(
            sa.update(WorkerRow).where(WorkerRow.name == "gone@here").values(seen_at=seen - timedelta(hours=1))
        )
    findings = list(check(settings))
    workers = {finding.what.split()[0]: finding for finding in findings if finding.part == "worker"}
    assert "sends no heartbeats" in workers["gone@here"].what
    assert workers["gone@here"].level == "warn"
    assert "runs version 0.0.1" in workers["old@here"].what
    (models,) = [finding for finding in findings if finding.part == "models"]
    assert (models.level, models.what) == ("bad", "3 jobs wait for 'sd15', which no live worker serves")
    assert "FARM_MODELS=sd15=" in models.do
    assert exit_code(findings) == 1


def test_a_farm_without_a_worker_is_told_to_start_one(on_sqlite: Settings) -> None:
    finding = only(on_sqlite, "worker")
    assert (finding.level, finding.do) == ("bad", "start one: `farm worker`")


def lead(database: Database) -> None:
    assert Leadership(database, DISPATCHER, lease_seconds=600).seek()


def fill_the_window(farm: Farm, database: Database) -> None:
    farm.submit(["a red circle"] * 200)
    assert Workers(database, farm.settings).slots() == {"tiny": 8}
    assert len(Backlog(database, farm.settings).queued("tiny")) == 16


def pause_a_batch_an_owner_and_a_job(farm: Farm, database: Database) -> None:
    farm.submit(["a red circle"], owner="anna").pause()
    farm.submit(["a red circle"], owner="ben")
    farm.owner("ben").pause()
    farm.job(f"{farm.submit(['a red circle'], owner='carl').id}-1").pause()
    farm.submit(["a red circle"], owner="ben", model="sd15")  # a model that no worker serves


def leave_a_submission_unaccepted(farm: Farm, database: Database) -> None:
    farm.submit(["a red circle"])
    put_back(database)
    with database.write() as session:
        session.execute(sa.update(BatchRow).values(accepted_at=None))


def let_a_job_wait_for_its_next_try(farm: Farm, database: Database) -> None:
    farm.submit(["a red circle"])
    put_back(database, not_before=datetime.now(UTC) + timedelta(hours=1))


def submit_twins(farm: Farm, database: Database) -> None:
    farm.submit(["a red circle"] * 5, seed=3)
    assert len(Backlog(database, farm.settings).queued("tiny")) == 1


def submit_what_is_too_large(farm: Farm, database: Database) -> None:
    model = ServedModel("tiny", limit=MemoryLimit(128 * 128, 1, UNGUIDED))
    Workers(database, farm.settings).describe(
        WorkerInfo(name="worker-1@here", device="cpu", dtype="float32", slots=8, version=__version__, models=(model,))
    )
    farm.submit(["a red circle"], width=1024, height=1024)
    assert farm.too_large() == {"tiny": 128 * 128}


def put_back(database: Database, **values: object) -> None:
    with database.write() as session:
        session.execute(sa.update(JobRow).values(state=JobState.PENDING.value, queued_at=None, **values))


@pytest.mark.parametrize(
    "keep_jobs_in_the_backlog",
    [
        fill_the_window,
        pause_a_batch_an_owner_and_a_job,
        leave_a_submission_unaccepted,
        let_a_job_wait_for_its_next_try,
        submit_twins,
        submit_what_is_too_large,
    ],
)
def test_jobs_that_have_a_reason_to_wait_are_no_fault(
    settings: Settings, database: Database, keep_jobs_in_the_backlog: Callable[[Farm, Database], None]
) -> None:
    lead(database)
    introduce(JobStore.over(database, settings), "worker-1@here")
    with Farm(settings) as farm:
        keep_jobs_in_the_backlog(farm, database)
    with database.read() as session:
        assert session.scalar(sa.select(sa.func.count()).where(JobRow.state == JobState.PENDING.value))
    findings = list(check(settings))
    assert [finding for finding in findings if finding.level != "ok"] == []


def test_a_dispatcher_that_runs_is_named(settings: Settings, database: Database) -> None:
    lead(database)
    finding = only(settings, "dispatcher")
    assert (finding.level, finding.what) == ("ok", f"runs on {socket.gethostname()} as process {os.getpid()}")


def test_without_a_dispatcher_the_doctor_says_so_even_if_no_job_waits(settings: Settings, database: Database) -> None:
    finding = only(settings, "dispatcher")
    assert (finding.level, finding.what, finding.do) == ("bad", "does not run", "start one: `farm dispatcher`")


def test_a_dispatcher_whose_lease_has_run_out_does_not_run(settings: Settings, database: Database) -> None:
    lead(database)
    with database.write() as session:
        session.execute(sa.update(LeaderRow).values(until=now_plus(sa.literal(-1.0))))
    assert only(settings, "dispatcher").level == "bad"


@pytest.mark.parametrize(
    ("part", "wrong", "what", "do"),
    [
        ("database", {"database_url": "postgresql://farm@127.0.0.1:1/farm"}, "does not answer", "FARM_DATABASE_URL"),
        ("database", {"database_url": "sqlite://"}, "no farm schema", "farm migrate"),
        ("broker", {"broker_url": "redis://:secret@127.0.0.1:1/0"}, "does not answer", "FARM_BROKER_URL"),
        ("storage", {"s3_endpoint_url": "http://127.0.0.1:1"}, "127.0.0.1:1", "FARM_S3_ENDPOINT_URL"),
        ("storage", {"s3_secret_access_key": "wrong"}, "SignatureDoesNotMatch", "credentials"),
        ("storage", {"s3_bucket": "not-there"}, "not-there", "FARM_S3_BUCKET"),
        ("flower", {"flower_url": "http://127.0.0.1:1"}, "does not answer", "FARM_FLOWER_URL"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_does_not_answer_is_bad_and_says_which_setting(
    on_sqlite: Settings, part: str, wrong: dict[str, str], what: str, do: str
) -> None:
    findings = list(check(Settings.load(**{**given(on_sqlite), **wrong})))
    (finding,) = [finding for finding in findings if finding.part == part]
    assert finding.level == "bad"
    assert what in finding.what
    assert do in finding.do
    assert exit_code(findings) == 1
    assert not [finding for finding in findings if "secret" in line(finding).plain]


def test_a_wrong_redis_password_is_told_from_an_absent_redis(on_sqlite: Settings) -> None:
    address = on_sqlite.broker_url.rpartition("@")[2]
    finding = only(on_sqlite.model_copy(update={"broker_url": f"redis://:wrong@{address}"}), "broker")
    assert "refuses the password" in finding.what


def given(settings: Settings) -> dict[str, object]:
    secret = settings.s3_secret_access_key
    return {**settings.model_dump(), "s3_secret_access_key": secret.get_secret_value() if secret else None}


def test_an_open_or_forgetful_redis_is_a_warning(on_sqlite: Settings) -> None:
    with redis.Redis.from_url(on_sqlite.broker_url) as client:
        password = client.config_get("requirepass")["requirepass"]
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("requirepass", "")
        try:
            address = on_sqlite.broker_url.rpartition("@")[2]
            findings = found(on_sqlite.model_copy(update={"broker_url": f"redis://{address}"}), "broker")
        finally:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("requirepass", password)
    assert [finding.level for finding in findings] == ["warn", "warn"]
    assert "allkeys-lru" in findings[0].what
    assert "without a password" in findings[1].what


@pytest.mark.parametrize(("status", "level"), [(200, "warn"), (401, "ok"), (500, "bad")])
def test_flower_must_ask_who_is_there(on_sqlite: Settings, status: int, level: str) -> None:
    with answering(status) as url:
        assert only(on_sqlite.model_copy(update={"flower_url": url}), "flower").level == level


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A web server that gives this status to every request."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_an_embedded_farm_that_does_not_run_is_told_to_be_started(embedded: Settings, tmp_path: Path) -> None:
    (tmp_path / "farm.json").write_bytes((embedded.home / "farm.json").read_bytes())
    findings = list(check(embedded.model_copy(update={"home": tmp_path}), embedded=True))
    assert [finding.part for finding in findings] == ["settings", "database"]
    assert (findings[0].level, findings[0].do) == ("bad", "start it: `farm up`")


def test_an_embedded_farm_that_runs_is_looked_at_part_by_part(embedded: Settings) -> None:
    levels = {finding.part: finding.level for finding in check(embedded, embedded=True)}
    # The test farm has no dispatcher, no Flower and no worker.
    assert levels == {
        "settings": "ok",
        "database": "ok",
        "broker": "ok",
        "storage": "ok",
        "flower": "bad",
        "dispatcher": "bad",
        "worker": "bad",
    }

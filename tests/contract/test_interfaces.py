"""Nothing that other programs rely on is lost or changed since the previous release; more of it may have come.

`interfaces.json` was written by that release, see `interfaces.py`. What is deliberately dropped is deleted from it.
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery.apps.worker import Worker
from prometheus_client import CollectorRegistry, generate_latest

from farm.dispatch.dispatcher import Dispatcher
from farm.dispatch.metrics import DispatcherCollector, FarmCollector
from farm.jobs.database import Database
from farm.jobs.leadership import Leadership
from farm.jobs.records import Picture
from farm.jobs.store import JobStore
from farm.objects.storage import Storage
from farm.queue.broker import Broker, make_app, priority_step, queue_name
from farm.settings import Settings
from farm.specs import object_keys
from farm.specs.spec import RenderSpec
from tests.contract import interfaces
from tests.contract.interfaces import RECORDED, changes
from tests.servers import fresh_bucket

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def current(
    sqlite_template: Path, embedded: Settings, bucket_maker: Storage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """The interfaces of this tree."""
    path = tmp_path_factory.mktemp("interfaces") / "farm.db"
    path.write_bytes(sqlite_template.read_bytes())
    with redis.Redis.from_url(embedded.broker_url) as client:
        client.flushall()
    with pytest.MonkeyPatch.context() as environment, fresh_bucket(embedded, bucket_maker) as s3:
        environment.setenv("FARM_DATABASE_URL", f"sqlite:///{path}")
        environment.setenv("FARM_BROKER_URL", embedded.broker_url)
        for name, value in s3.items():
            environment.setenv(f"FARM_{name.upper()}", value or "none")
        yield interfaces.found(Settings.load())


@pytest.mark.parametrize("section", ["python", "records", "settings", "command line", "json"])
def test_nothing_of_an_interface_is_gone_or_different(current: dict[str, Any], section: str) -> None:
    assert list(changes(RECORDED[section], current[section], section)) == []


def test_a_message_in_redis_is_what_programs_of_the_previous_release_send_and_understand(
    current: dict[str, Any],
) -> None:
    assert current["message"] == RECORDED["message"]


@pytest.mark.parametrize(
    ("recorded", "current", "said"),
    [
        ({"a": 1, "b": 2}, {"a": 1}, "it.b is gone"),
        ({"a": {"b": "int"}}, {"a": {"b": "str", "c": "int"}}, "it.a.b was 'int' and is 'str'"),
        ({"--n": {"default": "1"}}, {"--n": {"default": "2"}, "--m": {}}, "it.--n.default was '1' and is '2'"),
        (["--one", "--two"], ["--two", "--three"], "it lacks ['--one']"),
        ([{"a": 1}], [{}], "it[].a is gone"),
        ([{"a": 1}], [], "it is empty"),
        ([["a", "keyword-only", "1"]], [["a", "keyword-only", "2"]], "it has no parameter ['a', 'keyword-only', '1']"),
        ([], [["a", "keyword-only", "required"]], "it requires a further parameter a"),
        (
            [["a", "positional or keyword", "1"]],
            [["b", "positional or keyword", "1"], ["a", "positional or keyword", "1"]],
            "it has its parameter ['a', 'positional or keyword', '1'] elsewhere",
        ),
    ],
)
def test_a_change_is_noticed(recorded: Any, current: Any, said: str) -> None:
    assert list(changes(recorded, current, "it")) == [said]
    assert list(changes(recorded, recorded, "it")) == []


def test_a_dispatchers_metrics_have_their_names_and_labels(sqlite_url: str) -> None:
    settings = Settings(database_url=sqlite_url, broker_url="redis://127.0.0.1:1/0", s3_bucket="x")
    with closing(Database(sqlite_url)) as db, closing(Broker(settings)) as broker, closing(Storage(settings)) as s3:
        store = JobStore.over(db, settings)
        store.submissions.submit("batch", "me", 50, [RenderSpec(prompt="x", seed=1)])
        dispatcher = Dispatcher(store, broker, s3, settings)
        registry = CollectorRegistry()
        registry.register(FarmCollector(db, settings))
        registry.register(DispatcherCollector(dispatcher, Leadership(db, "dispatcher"), {"sql": db}))
        found = interfaces.metrics(generate_latest(registry).decode())
    assert list(changes(RECORDED["metrics"]["dispatcher"], found, "metrics")) == []


def test_the_programs_are_where_they_are_started_from() -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="farm")
    assert command.value == "farm.cli:main"
    assert callable(command.load())
    for module in ("farm.__main__", "farm.flower", "workers.__main__"):
        assert importlib.util.find_spec(module), module


def test_queues_and_priorities_are_where_workers_of_the_previous_release_look() -> None:
    assert queue_name("sd15") == "render.sd15"
    steps = {priority: priority_step(priority) for priority in (0, 9, 10, 11, 50, 79, 80, 89, 90, 100)}
    assert steps == {0: 9, 9: 9, 10: 8, 11: 8, 50: 4, 79: 2, 80: 1, 89: 1, 90: 0, 100: 0}
    app = make_app(Settings(database_url="sqlite://", broker_url="redis://127.0.0.1:1/0", s3_bucket="x"))
    options = app.conf.broker_transport_options
    assert (options["sep"], options["priority_steps"]) == (":", list(range(10)))
    assert (app.conf.task_serializer, app.conf.accept_content) == ("json", ["json"])


def test_objects_are_where_programs_of_the_previous_release_look() -> None:
    image = object_keys.image_key("b-1", 7, 2, "A red circle, äöü!")
    assert image == "b-1/00007-a-red-circle-aou.a2.png"
    assert object_keys.image_key("b-1", 7, 2, "…") == "b-1/00007.a2.png"
    assert object_keys.trajectory_keys(image) == (
        "b-1/00007-a-red-circle-aou.a2.trajectory.png",
        "b-1/00007-a-red-circle-aou.a2.trajectory.webp",
    )
    assert object_keys.checkpoint_key("b-1", 7, 2) == "b-1/00007.a2.checkpoint.safetensors"
    assert object_keys.preview_key("b-1", 7, 2) == "b-1/00007.a2.preview.png"
    assert object_keys.manifest_key("b-1") == "b-1/manifest.jsonl"


def test_a_jobs_end_is_logged_in_the_words_that_programs_parse(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(database_url=sqlite_url, broker_url="", s3_bucket="x", max_tries=1)
    caplog.set_level(logging.INFO)
    with closing(Database(sqlite_url)) as db:
        store = JobStore.over(db, settings)
        batch_id = store.submissions.submit("batch", "me", 50, [RenderSpec(prompt=str(n), seed=n) for n in range(4)])
        claims = [store.leases.claim(bell.job_id, "w1@host") for bell in store.backlog.enqueue(4).queued]
        done, failed, back, stopped = (claim for claim in claims if claim is not None)
        assert store.attempts.succeed(done, Picture("b/1.png", "aa", 1, 64, 64, "ee", 1.0))
        assert store.attempts.fail(failed, "broken")
        assert store.attempts.hand_back(back)
        store.steering.cancel(job_id=stopped.job_id)
        assert store.attempts.stopped(stopped)
    ended = re.findall(r"^ended job_id=(\S+) attempt=(\d+) now=(\w+)", "\n".join(caplog.messages), re.MULTILINE)
    states = ["succeeded", "failed", "pending", "cancelled"]
    assert ended == [(f"{batch_id}-{n}", "1", state) for n, state in enumerate(states, 1)]


def test_a_dispatcher_that_has_started_logs_what_programs_wait_for(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(database_url=sqlite_url, broker_url="redis://127.0.0.1:1/0", s3_bucket="x")
    caplog.set_level(logging.INFO)
    stop = threading.Event()
    stop.set()
    with closing(Database(sqlite_url)) as db, closing(Broker(settings)) as broker, closing(Storage(settings)) as s3:
        Dispatcher(JobStore.over(db, settings), broker, s3, settings).run(stop, Leadership(db, "dispatcher"))
    assert any(message.startswith("dispatching") for message in caplog.messages)


def test_a_worker_that_has_started_logs_what_programs_wait_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("celery.signals.worker_ready.receivers", [])
    Worker.on_consumer_ready(SimpleNamespace(hostname="w1@host"), None)  # Celery logs it, not the farm
    assert "w1@host ready." in caplog.messages


def test_the_autoscalers_question_is_the_one_that_farms_have_in_use() -> None:
    query = (ROOT / "infra" / "keda" / "device_seconds.sql").read_text()
    assert (ROOT / "infra" / "helm" / "diffusion-farm" / "files" / "device_seconds.sql").read_text() == query
    # KEDA asks it of farms that are upgraded: whoever changes it must see that the schema still answers the old one.
    words = " ".join(re.sub(r"--.*", "", query).split())
    assert hashlib.sha256(words.encode()).hexdigest() == RECORDED["device_seconds.sql"]

"""The metrics endpoint of a process: its address, its other pages, and its answers during an outage."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge

from farm.dispatch.metrics import FarmCollector, WorkerTargets, target
from farm.errors import DatabaseUnavailable, NotConfigured
from farm.jobs.database import Database
from farm.jobs.records import WorkerInfo
from farm.local import parts
from farm.local.home import Home
from farm.runtime.metrics_server import MetricsServer
from farm.settings import Settings


def settings(**values: Any) -> Settings:
    return Settings(
        **{
            "database_url": "sqlite://",
            "broker_url": "redis://127.0.0.1:1/0",
            "s3_bucket": "x",
            "metrics_port": 0,
            **values,
        }
    )


@contextmanager
def served(registry: CollectorRegistry, more: Any = None, **values: Any) -> Iterator[MetricsServer]:
    server = MetricsServer(settings(**values), registry, more)
    server.start()
    yield server
    server.close()


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_metrics_are_at_one_path_and_nothing_is_at_others() -> None:
    registry = CollectorRegistry()
    Gauge("farm_test", "A test.", registry=registry).set(3)
    with served(registry) as server:
        assert server.url == f"http://127.0.0.1:{server.port}/metrics"
        status, text = get(server.url)
        assert status == 200
        assert "farm_test 3.0" in text
        root = server.url.removesuffix("/metrics")
        for path in ("/", "/workers", "/metrics/", "/../metrics", "/etc/passwd"):
            assert get(root + path)[0] == 404


def test_a_port_that_is_taken_is_not_shared() -> None:
    with served(CollectorRegistry()) as server, pytest.raises(NotConfigured, match="FARM_METRICS_PORT"):
        MetricsServer(settings(metrics_port=server.port), CollectorRegistry())


def test_a_server_that_never_answered_frees_its_port() -> None:
    silent = MetricsServer(settings(), CollectorRegistry())
    silent.close()
    with served(CollectorRegistry(), metrics_port=silent.port):
        pass


def test_each_part_of_the_embedded_farm_has_a_port_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_METRICS_PORT", "9400")
    home = Home(tmp_path)
    given = home.settings(home.access())
    made = [parts.dispatcher(home, given), *(parts.worker(home, given, n, 2, None) for n in (1, 2))]  # type: ignore[arg-type]
    assert [part.env["FARM_METRICS_PORT"] for part in made] == ["9400", "9401", "9402"]
    for number, part in enumerate(made):
        assert part.address.endswith(f"metrics http://127.0.0.1:{9400 + number}/metrics")


def test_an_address_that_is_none_is_said() -> None:
    with pytest.raises(NotConfigured, match=r"no metrics at 203\.0\.113\.1:0: Cannot assign"):
        MetricsServer(settings(metrics_host="203.0.113.1"), CollectorRegistry())


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_wildcard_host_is_published_as_the_address_that_reaches_redis(host: str) -> None:
    try:
        with served(CollectorRegistry(), metrics_host=host) as server:
            assert server.url == f"http://127.0.0.1:{server.port}/metrics"
    except NotConfigured as error:  # the machine has no IPv6
        assert host == "::"
        pytest.skip(str(error))


class Workers:
    """A registry of workers, or one whose database does not answer."""

    def __init__(self, *known: WorkerInfo, away: bool = False) -> None:
        self.known, self.away = known, away

    def all(self) -> list[WorkerInfo]:
        if self.away:
            raise DatabaseUnavailable("away")
        return list(self.known)


def test_live_workers_with_metrics_are_named_as_prometheus_discovers_them() -> None:
    def worker(name: str, url: str | None, *, alive: bool = True) -> WorkerInfo:
        return WorkerInfo(name, "cpu", "float32", 4, "1", alive=alive, metrics_url=url)

    store = Workers(
        worker("w1@a", "http://10.0.0.1:9400/metrics"),
        worker("w2@a", None),
        worker("w3@b", "http://10.0.0.2:9400/metrics", alive=False),
        worker("w4@b", "http://[fd00::2]:9401/metrics"),
    )
    with served(CollectorRegistry(), {"/workers": WorkerTargets(store)}) as server:
        status, text = get(server.url.replace("/metrics", "/workers"))
    assert status == 200
    assert json.loads(text) == [
        target("w1@a", "http://10.0.0.1:9400/metrics"),
        {
            "targets": ["[fd00::2]:9401"],
            "labels": {"worker": "w4@b", "__scheme__": "http", "__metrics_path__": "/metrics"},
        },
    ]


def test_prometheus_keeps_its_targets_while_sql_is_away() -> None:
    with served(CollectorRegistry(), {"/workers": WorkerTargets(Workers(away=True))}) as server:
        assert get(server.url.replace("/metrics", "/workers"))[0] == 503


def told(collector: FarmCollector) -> dict[str, float]:
    return {sample.name: sample.value for family in collector.collect() for sample in family.samples}


def test_a_scrape_has_an_answer_while_sql_is_away(tmp_path: Path) -> None:
    away = Database(f"sqlite:///{tmp_path}/not/there/farm.db")
    assert told(FarmCollector(away, settings())) == {"farm_sql_up": 0}
    away.close()


def test_a_scrape_waits_for_no_database_that_hangs_and_many_scrapes_ask_it_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    answers = threading.Event()

    def hang(*_: object) -> Any:
        asked.append(1)
        answers.wait(30)
        return SimpleNamespace(workers=2, jobs={}, models={})

    monkeypatch.setattr("farm.dispatch.metrics.demands", hang)
    monkeypatch.setattr("farm.dispatch.metrics._PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr("farm.dispatch.metrics._FRESH_SECONDS", 0.0)
    collector = FarmCollector(SimpleNamespace(), settings())  # type: ignore[arg-type]
    for _ in range(3):
        assert told(collector) == {"farm_sql_up": 0}
    assert len(asked) == 1
    answers.set()
    until(lambda: told(collector) == {"farm_sql_up": 1, "farm_workers": 2})


def until(true: Callable[[], bool]) -> None:
    for _ in range(200):
        if true():
            return
    raise AssertionError("never")

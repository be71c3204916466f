"""A farm scraped by Debian's Prometheus, with the shipped configuration, alerts and dashboard."""

import json
import math
import os
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from farm.client.farm import Farm
from farm.jobs.states import JobState
from farm.objects.storage import Storage
from farm.settings import Settings
from farm.specs.spec import RenderSpec
from tests.forked import run_forked
from tests.integration.conftest import Crew, environment, wait_until
from tests.prometheus import ROOT, SHIPPED, Prometheus, free_port, prometheus, promtool

DASHBOARD = ROOT / "infra" / "grafana" / "farm.json"


@dataclass
class Watched:
    """A running farm, and the Prometheus that scrapes it."""

    crew: Crew
    farm: Farm
    prometheus: Prometheus
    dispatcher: str
    """`host:port` of the dispatcher's metrics."""

    def rises_to(self, promql: str, value: float) -> None:
        """Wait until an expression has this value; fails if it exceeds it."""
        seen: list[float | None] = []

        def there() -> bool:
            found = self.prometheus.value(promql)
            seen.append(found)
            assert found is None or found <= value, f"{promql} is {found}, more than {value}"
            return found == value

        try:
            wait_until(there, f"{promql} is {value}", 20)
        except AssertionError as error:
            raise AssertionError(f"{error}; seen: {sorted({str(one) for one in seen})}") from None


@pytest.fixture(scope="module")
def watched(
    embedded: Settings, bucket_maker: Storage, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    """A dispatcher, a worker of the small model and a worker of null models, each scraped every second."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "farm.db").write_bytes(sqlite_template.read_bytes())
    bucket_maker.bucket = f"test-watched-{folder.name.lower()}-{os.getpid()}"
    bucket_maker.ensure_bucket()
    settings = embedded.model_copy(
        update={
            "database_url": f"sqlite:///{folder / 'farm.db'}",
            "s3_bucket": bucket_maker.bucket,
            "home": folder / "home",
            "forward_sizes": folder / "forwards.json",
            "lease_seconds": 3.0,
            "beat_seconds": 0.5,
        }
    )
    port = free_port()
    crew = Crew(settings, folder)
    try:
        with prometheus(folder, f"127.0.0.1:{port}") as watching, Farm(settings) as farm:
            crew.dispatcher(FARM_METRICS_PORT=port)
            crew.start_worker("w1", "tiny", FARM_SLOTS=4, FARM_METRICS_PORT=0)
            small = "small=null:?most_pixels=4096"
            crew.worker("w2", f"paced=null:?seconds_per_step=0.1,{small}", FARM_METRICS_PORT=0, FARM_MAX_TRIES=1)
            watched = Watched(crew, farm, watching, f"127.0.0.1:{port}")
            watched.rises_to('sum(up{job="farm-workers"})', 2)
            yield watched
    finally:
        crew.end()
        bucket_maker.delete_many(bucket_maker.keys())
        bucket_maker._s3.delete_bucket(Bucket=bucket_maker.bucket)


def fetched(where: str) -> bytes:
    with urllib.request.urlopen(f"http://{where}", timeout=10) as answer:
        content: bytes = answer.read()
        return content


def test_prometheus_finds_every_worker_by_asking_the_dispatcher(watched: Watched) -> None:
    targets = watched.prometheus.targets()
    assert {one["labels"]["job"] for one in targets} == {"farm-dispatcher", "farm-workers"}
    names = {one["labels"].get("worker", "").partition("@")[0] for one in targets}
    assert names == {"", "w1", "w2"}
    wait_until(lambda: {one["health"] for one in watched.prometheus.targets()} == {"up"}, "all are up")
    watched.rises_to("farm_workers", 2)


def test_every_job_is_counted_once(watched: Watched) -> None:
    batch = watched.farm.submit(["a red circle"] * 6, num_inference_steps=2, reuse=False)
    assert batch.wait(60).counts[JobState.SUCCEEDED] == 6
    for promql in (
        'farm_worker_jobs_total{model="tiny", outcome="succeeded"}',
        'sum(farm_worker_jobs_total{model="tiny"})',
        'farm_worker_wait_seconds_count{model="tiny"}',
        'farm_worker_render_seconds_count{model="tiny"}',
        'farm_worker_step_seconds_count{model="tiny"}',
        'farm_jobs{state="succeeded"}',
    ):
        watched.rises_to(promql, 6)
    value = watched.prometheus.value
    # A prompt and a negative prompt for each job, and for the warm-up render.
    hits, misses = (
        value("sum(farm_worker_embedding_cache_hits_total)"),
        value("sum(farm_worker_embedding_cache_misses_total)"),
    )
    assert hits is not None
    assert misses is not None
    assert (hits + misses, misses) == (14, 3)
    assert value('farm_worker_model_loads_total{worker=~"w1@.*"}') == 1
    seconds = sum(job.picture.device_seconds or 0 for job in batch if job.picture)
    assert value('farm_worker_device_seconds_total{model="tiny"}') == pytest.approx(seconds)


def test_every_query_of_the_dashboard_has_an_answer(watched: Watched) -> None:
    queries = list(expressions(json.loads(DASHBOARD.read_text())))
    assert len(queries) > 30
    batch = watched.farm.submit(["a blue star", "a red ring"] * 200, num_inference_steps=2, reuse=False)
    unanswered = dict.fromkeys(queries, "")

    def answered() -> bool:
        for query in list(unanswered):
            found = watched.prometheus.query(
                query.replace("$__rate_interval", "10s").replace('"$model"', '".*"').replace('"$worker"', '".*"')
            )
            if any(not math.isnan(float(one["value"][1])) for one in found):
                del unanswered[query]
        return not unanswered

    try:
        wait_until(answered, "answered", 30)
    except AssertionError:
        raise AssertionError(f"no data for {sorted(unanswered)}") from None
    finally:
        batch.cancel()
    batch.wait(60)


def expressions(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        assert panel["type"] == "row" or panel["targets"], panel["title"]
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield re.sub(r"label_values\((\w+), (\w+)\)", r"count by (\2) (\1)", variable["definition"])


def test_the_alerts_ask_for_what_there_is(watched: Watched) -> None:
    names = set(re.findall(r"\bfarm_[a-z_]*[a-z]\b", (SHIPPED / "alerts.yml").read_text()))
    assert len(names) > 8
    for name in names:
        assert watched.prometheus.query(name), name
    alarm = 'ALERTS{alertname=~"FarmNoDispatcher|FarmNoLeader|FarmDatabaseAway", alertstate="firing"}'
    assert watched.prometheus.query(alarm) == []


def test_a_picture_without_room_is_counted_as_that(watched: Watched) -> None:
    spec = RenderSpec(prompt="x", model="small", width=128, height=128, num_inference_steps=1)
    assert watched.farm.submit(spec).wait(60).counts[JobState.FAILED] == 1
    watched.rises_to('farm_worker_jobs_total{model="small", outcome="failed"}', 1)
    watched.rises_to('sum(farm_worker_errors_total{error_class="out_of_memory"})', 1)
    assert watched.prometheus.value("sum(farm_worker_errors_total)") == 1


def test_what_waits_is_told_in_device_seconds_and_a_lost_worker_is_noticed(watched: Watched) -> None:
    first = watched.farm.submit("x", model="paced", num_inference_steps=10)
    first.wait(60)
    # Of the same model: one job of it took a second.
    batch = watched.farm.submit(["x"] * 200, model="paced", num_inference_steps=10, reuse=False)
    watched.rises_to('farm_active_jobs{state="running", model="paced"}', 6)  # four in the slots, and two that come next
    value = watched.prometheus.value
    waits = 'sum by (model) (farm_active_jobs{state=~"pending|queued", model="paced"})'
    wait_until(
        lambda: bool(
            watched.prometheus.query(f'farm_queued_device_seconds{{model="paced"}} / on (model) ({waits}) > 0.2 < 5')
        ),
        "device seconds of the waiting jobs",
    )
    assert value('farm_model_workers{model="paced"}') == 1
    assert value('farm_worker_slots_in_use{worker=~"w2@.*"}') is not None
    lost = value("sum(farm_lost_leases_total)")
    assert lost == 0
    killed = next(one for one in watched.crew._started if one.name == "w2")
    running = batch.status().counts[JobState.RUNNING]
    killed.kill()
    wait_until(lambda: (value("sum(farm_lost_leases_total)") or 0) > 0, "lost leases are counted")
    assert running
    assert 0 < (value("sum(farm_lost_leases_total)") or 0) <= 6
    wait_until(lambda: len(watched.prometheus.targets()) == 2, "a worker that is gone is not scraped")
    wait_until(lambda: value('farm_model_workers{model="paced"}') == 0, "no worker serves its model")
    batch.cancel()


def test_the_metrics_keep_prometheus_own_rules(watched: Watched) -> None:
    worker = next(one["scrapeUrl"] for one in watched.prometheus.targets() if "worker" in one["labels"])
    for where in (f"{watched.dispatcher}/metrics", worker.removeprefix("http://")):
        said = promtool("check", "metrics", given=fetched(where))
        assert "farm_" not in said, said


def test_configuration_and_alerts_are_valid_and_fire_when_they_should() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "alerts.yml")
    promtool("test", "rules", "alerts_test.yml")
    text = (SHIPPED / "alerts.yml").read_text()
    assert text.count("- alert:") == text.count("summary:") == text.count("description:")


def test_a_port_that_is_taken_is_said_in_a_line(watched: Watched) -> None:
    taken = environment(watched.crew.settings, FARM_METRICS_PORT=watched.dispatcher.rpartition(":")[2])
    done = run_forked("farm", "dispatcher", env=taken)
    assert done.returncode == 2
    assert re.search(r"no metrics at 127\.0\.0\.1:\d+: Address already in use; set FARM_METRICS_PORT", done.stderr)
    assert "Traceback" not in done.stderr

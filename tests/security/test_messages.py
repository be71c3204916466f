"""Forged and malformed messages in the real queue run no code, crash no worker, and forge no log lines."""

import base64
import json
import os
import pickle
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from farm.client.farm import Farm
from farm.jobs.states import JobState
from farm.local import LocalFarm
from farm.queue.broker import RENDER_TASK, Broker, make_app, priority_step, queue_name
from tests.integration.conftest import wait_until

QUEUE = queue_name("tiny")
REFUSED = re.compile(
    r"^\d{4}-.*(nothing to claim|refused a message|"  # the farm's
    "Refusing to deserialize|Can't decode message body|unregistered task|raised unexpected)",  # Celery's
    re.MULTILINE,
)


def message(
    job_id: Any = "nobody-1", *, body: bytes | None = None, content_type: str = "application/json", **headers: Any
) -> str:
    """A message as Celery writes it, with the given fields replaced."""
    given = json.dumps([[job_id], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]).encode()
    return json.dumps(
        {
            "body": base64.b64encode(given if body is None else body).decode(),
            "content-encoding": "utf-8",
            "content-type": content_type,
            "headers": {
                **dict.fromkeys(("shadow", "eta", "expires", "group", "parent_id", "stamped_headers")),
                "lang": "py",
                "task": RENDER_TASK,
                "id": job_id,
                "root_id": job_id,
                "retries": 0,
                "origin": "x",
                "timelimit": [None, None],
                "argsrepr": "()",
                "kwargsrepr": "{}",
                "ignore_result": True,
                "stamps": {},
                **headers,
            },
            "properties": {
                "correlation_id": job_id,
                "reply_to": str(uuid.uuid4()),
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": QUEUE},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    )


@pytest.fixture
def line(whole: LocalFarm) -> Iterator["Line"]:
    with redis.Redis.from_url(whole.settings.broker_url) as client, Farm(whole.settings) as farm:
        yield Line(whole, client, farm)


class Line:
    """The queue of a running farm, and the worker's reactions to messages."""

    def __init__(self, whole: LocalFarm, client: redis.Redis, farm: Farm) -> None:
        self._whole, self._client, self._farm = whole, client, farm
        self._log = whole.home.logs / "worker-1.log"
        self._from = self._log.stat().st_size
        self._pids = whole.pids()

    def put(self, *messages: str | bytes, queue: str = QUEUE) -> None:
        """Put messages into the queue; wait until all are acknowledged and a job behind them is rendered."""
        for one in messages:
            self._client.lpush(queue, one)
        wait_until(lambda: not self._client.llen(queue), "every message is taken", 30)
        batch = self._farm.submit(["a cat"], num_inference_steps=1)
        assert batch.wait(30).counts[JobState.SUCCEEDED] == 1
        wait_until(lambda: not self._client.hlen("unacked"), "every message is acknowledged", 30)
        assert self._whole.pids() == self._pids

    def said(self) -> str:
        """The worker's log since the start of the test."""
        return self._log.read_bytes()[self._from :].decode()


class _Evil:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self._path}",)


def test_only_json_is_read_and_nothing_in_a_message_is_run(line: Line, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    pickled = pickle.dumps([[_Evil(trap)], {}, {}])
    pickle.loads(pickled)
    assert trap.exists()  # the exploit works when unpickled
    trap.unlink()
    yaml = f"!!python/object/apply:os.system ['touch {trap}']".encode()
    line.put(
        message(body=pickled, content_type="application/x-python-serialize"),
        message(body=pickled, content_type="pickle"),
        message(body=yaml, content_type="application/x-yaml"),
        message(body=pickled),
        message(task="os.system"),
        message(task="celery.map"),
    )
    assert not trap.exists()
    assert len(REFUSED.findall(line.said())) == 6


def test_an_id_that_is_no_jobs_finds_nothing(line: Line) -> None:
    ids = ["nobody-1", "x'; DROP TABLE jobs;--", "' OR 1=1 --", "../../etc/passwd", "%", "", "x" * 1_000_000]
    line.put(*map(message, ids))
    said = line.said()
    assert len(REFUSED.findall(said)) == len(ids)
    assert len(said) < 40_000


def test_an_id_can_neither_forge_a_line_of_the_log_nor_steer_a_terminal(line: Line) -> None:
    forged = "2026-01-01 00:00:00,000 CRITICAL farm forged"
    line.put(message(f"a\n{forged}"), message("\x1b[2J\x1b]0;pwned\x07"), message("a\rb\x9b\u202ec"))
    said = line.said()
    assert len(REFUSED.findall(said)) == 3
    assert not [one for one in said.split("\n") if one.startswith(forged)]
    assert all(char.isprintable() or char == "\n" for char in said)


@pytest.mark.parametrize("name", ["accept_content", "event_serializer", "task_serializer", "result_serializer"])
def test_no_app_of_the_farm_writes_or_reads_anything_but_json(whole: LocalFarm, name: str) -> None:
    assert make_app(whole.settings).conf[name] in ("json", ["json"])


def tampered(change: Callable[[dict[str, Any]], object]) -> str:
    """A message after `change` has modified it."""
    given = json.loads(message())
    change(given)
    return json.dumps(given)


def test_a_message_of_another_shape_is_put_away_and_ends_no_worker(line: Line) -> None:
    line.put(
        tampered(lambda given: given.update(body="%%%%")),
        tampered(lambda given: given["headers"].pop("id")),
        tampered(lambda given: given["headers"].update(task=["render"])),
        tampered(lambda given: given["headers"].update(eta="junk")),
        tampered(lambda given: given["properties"].pop("correlation_id")),
        *(message(body=body) for body in (b"[1,2]", b'{"a":1}', b'"x"', b"[" * 100_000, b'[["other-1"],{},{}]')),
    )
    assert line.said().count("refused a message") == 10


def test_what_is_no_message_at_all_is_put_away_and_ends_no_worker(line: Line) -> None:
    unread: list[str | bytes] = [
        "5",
        "[]",
        '""',
        "null",
        "{}",
        "",
        "hello",
        b"\xff\xfe",
        "[" * 100_000,
        '{"properties": 5}',
    ]
    for name in ("delivery_tag", "delivery_info", "body_encoding"):
        unread += [tampered(lambda given, name=name: given["properties"].update({name: [1]}))]
    unread += [tampered(lambda given: given.update(body=[1]))]
    line.put(*unread)
    assert line.said().count("refused a message") == len(unread)


def test_what_is_no_message_among_less_urgent_ones_ends_no_worker_either(line: Line) -> None:
    line.put("5", b"\xff\xfe", queue=f"{QUEUE}:{priority_step(50)}")
    assert line.said().count("refused a message") == 2


def test_the_dispatcher_passes_over_what_is_no_message(whole: LocalFarm) -> None:
    with redis.Redis.from_url(whole.settings.broker_url) as client:
        client.lpush(queue_name("elsewhere"), "5", "[]", "{}", '{"headers": null}', "hello", b"\xff\xfe", message())
    broker = Broker(whole.settings)
    assert broker.waiting("elsewhere") == {"nobody-1"}
    broker.close()

"""Credentials are generated, and appear in no log, message, command line or page; only loopback ports are open."""

import base64
import io
import json
import os
import re
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
from rich.console import Console

from farm.cli.doctor import check, line
from farm.client.farm import Farm
from farm.errors import FarmError
from farm.jobs.records import Doorbell
from farm.jobs.states import JobState
from farm.local import LocalFarm
from farm.local.home import Home
from farm.objects.storage import Storage, without_login
from farm.queue.broker import Broker, priority_step, queue_name
from farm.settings import Settings
from tests.integration.conftest import wait_until
from tests.security.conftest import HOSTILE

pytestmark = pytest.mark.usefixtures("no_takeover")

SECRETS = ("redis_password", "s3_secret_access_key", "s3_internal_key", "flower_password")


@pytest.fixture
def access(whole: LocalFarm) -> dict[str, str]:
    found: dict[str, str] = json.loads((whole.home.path / "farm.json").read_text())
    return found


def processes(whole: LocalFarm) -> Iterator[psutil.Process]:
    for pid in whole.pids().values():
        yield psutil.Process(pid)
        yield from psutil.Process(pid).children(recursive=True)


# --- the embedded farm ---------------------------------------------------------------------------------------------


def test_each_home_has_passwords_of_its_own(tmp_path: Path) -> None:
    homes = [Home(tmp_path / str(number)) for number in range(20)]
    made = [home.access() for home in homes]
    for name in SECRETS:
        values = {getattr(access, name) for access in made}
        assert len(values) == len(made)
        assert min(map(len, values)) >= 16
    assert not [name for name in SECRETS if getattr(made[0], name) in repr(made[0])]


def test_every_part_of_a_whole_farm_listens_on_loopback_only(whole: LocalFarm) -> None:
    listening = {
        (process.name(), address.laddr.ip)
        for process in processes(whole)
        for address in process.net_connections("inet")
        if address.status == psutil.CONN_LISTEN
    }
    assert len(whole.pids()) == 5
    assert {ip for _, ip in listening} == {"127.0.0.1"}, listening


def test_nothing_in_a_home_is_for_others_even_where_it_was_open_before(whole: LocalFarm, tmp_path: Path) -> None:
    home = whole.home.path
    found = [home, *home.iterdir(), *whole.home.logs.iterdir(), *whole.home.run.iterdir()]
    assert len(found) > 20
    assert not [path for path in found if path.stat().st_mode & 0o077]
    for folder in ("logs", "run", "redis"):
        (tmp_path / folder).mkdir(mode=0o777)
    (tmp_path / "farm.db").touch(0o644)
    opened = Home(tmp_path)
    opened.take()
    opened.data("redis")
    opened.release()
    assert {stat.S_IMODE((tmp_path / folder).stat().st_mode) for folder in ("logs", "run", "redis")} == {0o700}
    assert stat.S_IMODE((tmp_path / "farm.db").stat().st_mode) == 0o600


def test_no_secret_stands_in_a_command_line_a_log_a_message_or_what_the_farm_says(
    whole: LocalFarm, access: dict[str, str]
) -> None:
    with Farm(whole.settings) as farm:
        assert farm.submit(["a cat"], num_inference_steps=1).wait(30).counts[JobState.SUCCEEDED] == 1
        assert farm.submit(["a cat"], width=4096, height=4096, clip_skip=20).wait(60).done
    table = Console(file=io.StringIO(), width=300)
    table.print(whole.table())
    told = {
        "command lines": "\n".join(" ".join(process.cmdline()) for process in processes(whole)),
        "the farm's output": whole._console.file.getvalue() + table.file.getvalue(),  # type: ignore[attr-defined]
        "parts": repr([kept.part for kept in whole._kept]),
        "settings": repr(whole.settings) + str(whole.settings),
        "the doctor": "\n".join(line(finding).plain for finding in check(whole.settings)),
        **{path.name: path.read_text(errors="replace") for path in whole.home.logs.iterdir()},
    }
    broker = Broker(whole.settings)
    broker.publish([Doorbell("nobody-1", "nobody", 50, "a cat")])
    broker.close()
    with redis.Redis.from_url(whole.settings.broker_url, decode_responses=True) as client:
        (told["a message"],) = client.lrange(f"{queue_name('nobody')}:{priority_step(50)}", 0, -1)
    assert "weed" in told["command lines"]
    assert "claimed" in told["worker-1.log"]
    for where, text in told.items():
        assert not [name for name in SECRETS if access[name] in text], where


def test_a_person_at_a_terminal_is_told_how_to_get_into_flower_and_a_file_is_not(
    whole: LocalFarm, access: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(terminal: bool) -> str:
        console = Console(file=io.StringIO(), width=300, force_terminal=terminal)
        monkeypatch.setattr(whole, "_console", console)
        console.print(whole.table())
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    assert access["flower_password"] in shown(terminal=True)
    assert access["flower_password"] not in shown(terminal=False)
    assert "farm.json" in shown(terminal=False)


# --- Flower --------------------------------------------------------------------------------------------------------


def flower(access: dict[str, str], path: str) -> str:
    token = base64.b64encode(f"{access['flower_user']}:{access['flower_password']}".encode()).decode()
    request = urllib.request.Request(f"{access['flower_url']}{path}", headers={"Authorization": f"Basic {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read().decode())


def test_flower_shows_prompts_as_text_and_tells_no_password(whole: LocalFarm, access: dict[str, str]) -> None:
    with Farm(whole.settings) as farm:
        batch = farm.submit([HOSTILE["HTML"]], name="in-flower", num_inference_steps=1)
        assert batch.wait(30).counts[JobState.SUCCEEDED] == 1
        task = f"{batch.id}-1"

    def seen() -> bool:
        try:
            return "SUCCESS" in flower(access, f"/task/{task}")
        except urllib.error.HTTPError:
            return False

    wait_until(seen, "Flower has seen the job succeed", 30)
    page = flower(access, f"/task/{task}")
    assert "&lt;script&gt;" in page
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    for path in (
        "/broker",
        "/workers",
        "/api/workers?refresh=1",
        "/api/queues/length",
        f"/worker/worker-1@{os.uname().nodename}",
    ):
        page = flower(access, path)
        assert not [name for name in SECRETS if access[name] in page], path


# --- error messages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "without"),
    [
        ("http://user:secret@host:80/x?a=b@c", "http://host:80/x?a=b@c"),
        ("https://host/a@b", "https://host/a@b"),
        ("user:secret@host", "host"),
        ("AWS S3", "AWS S3"),
    ],
)
def test_an_address_is_shown_without_its_login(url: str, without: str) -> None:
    assert without_login(url) == without


@pytest.mark.parametrize(
    "wrong",
    [
        {"s3_endpoint_url": "http://user:hunter2@127.0.0.1:1"},
        {"s3_endpoint_url": "user:hunter2@nowhere"},
        {"broker_url": "redis://:hunter2@127.0.0.1:1/0"},
        {"broker_url": "redis://:hunter2/x@127.0.0.1:1/0"},
        {"broker_url": "redis://:x@127.0.0.1:hunter2/0"},
        {"broker_url": "redis://127.0.0.1:1/0?password=hunter2"},
        {"flower_url": "http://user:hunter2@127.0.0.1:1"},
        {"flower_url": "http://user:x@127.0.0.1:hunter2"},
        {"database_url": "postgresql://u:hunter2@127.0.0.1:1/farm"},
        {"database_url": "postgresql://127.0.0.1:1/farm?user=u&password=hunter2&sslpassword=hunter2"},
    ],
    ids=lambda wrong: "".join(wrong.values()),
)
def test_no_password_is_quoted_by_what_the_doctor_says_is_wrong(
    sqlite_url: str, tmp_path: Path, wrong: dict[str, str]
) -> None:
    base = {
        "database_url": sqlite_url,
        "broker_url": "redis://127.0.0.1:1/0",
        "s3_bucket": "b",
        "s3_endpoint_url": "http://127.0.0.1:1",
        "s3_access_key_id": "id",
        "s3_secret_access_key": "hunter2",
        "home": tmp_path / "home",
    }
    settings = Settings.load(**{**base, **wrong})
    said = "\n".join(line(finding).plain for finding in check(settings))
    (name,) = wrong
    part = {"s3": "storage", "broker": "broker", "flower": "flower", "database": "database"}[name.partition("_")[0]]
    assert re.search(f"✗ {part}: ", said)
    assert "hunter2" not in said
    storage = Storage(settings)
    with pytest.raises(FarmError) as caught:
        storage.ping()
    assert "hunter2" not in str(caught.value)
    storage.close()

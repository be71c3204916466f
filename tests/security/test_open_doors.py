"""The doctor warns of a Redis, a bucket or a Flower that is open without credentials."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import boto3
import pytest
import redis

from farm.cli.doctor import check
from farm.runtime.finding import Finding
from farm.settings import Settings
from tests.integration.conftest import wait_until

pytestmark = pytest.mark.usefixtures("no_takeover")


def found(settings: Settings, part: str) -> Finding:
    (finding,) = [finding for finding in check(settings) if finding.part == part]
    return finding


@pytest.mark.parametrize("login", ["", "?password={password}", ":{password}@"], ids=["none", "in the query", "wanted"])
def test_a_redis_that_needs_no_password_is_told_from_one_that_does(on_sqlite: Settings, login: str) -> None:
    with redis.Redis.from_url(on_sqlite.broker_url) as client:
        password = client.config_get("requirepass")["requirepass"]
        address = on_sqlite.broker_url.rpartition("@")[2]
        given = login.format(password=password)
        url = f"redis://{address}{given}" if given.startswith("?") else f"redis://{given}{address}"
        settings = on_sqlite.model_copy(update={"broker_url": url})
        if given:
            assert found(settings, "broker").level == "ok"
        client.config_set("requirepass", "")
        try:
            opened = found(settings, "broker") if not given.startswith(":") else None
        finally:
            client.config_set("requirepass", password)
    if opened is not None:
        assert (opened.level, "without a password" in opened.what) == ("warn", True)


@pytest.mark.parametrize(
    ("action", "may"),
    [
        ("s3:GetObject", "read the pictures"),
        ("s3:ListBucket", "list them"),
        (["s3:GetObject", "s3:ListBucket"], "read the pictures and list them"),
    ],
    ids=str,
)
def test_what_a_stranger_may_do_in_the_bucket_is_said(on_sqlite: Settings, action: object, may: str) -> None:
    assert found(on_sqlite, "storage").level == "ok"
    secret = on_sqlite.s3_secret_access_key
    assert secret is not None
    client = boto3.client(
        "s3",
        endpoint_url=on_sqlite.s3_endpoint_url,
        region_name="us-east-1",
        aws_access_key_id=on_sqlite.s3_access_key_id,
        aws_secret_access_key=secret.get_secret_value(),
    )
    bucket = f"arn:aws:s3:::{on_sqlite.s3_bucket}"
    allow = {"Effect": "Allow", "Principal": "*", "Action": action, "Resource": [bucket, f"{bucket}/*"]}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allow]})
    client.put_bucket_policy(Bucket=on_sqlite.s3_bucket, Policy=policy)
    try:
        opened = found(on_sqlite, "storage")
    finally:
        client.delete_bucket_policy(Bucket=on_sqlite.s3_bucket)
    assert (opened.level, opened.do) == ("warn", "take away public access")
    assert opened.what.endswith(f"without credentials anyone can {may}")
    assert not client.list_objects_v2(Bucket=on_sqlite.s3_bucket).get("Contents")
    client.close()


def test_a_bucket_that_anyone_may_write_to_is_a_warning(on_sqlite: Settings) -> None:
    with serving(OpenBucket) as url:
        opened = found(on_sqlite.model_copy(update={"s3_endpoint_url": url}), "storage")
    assert opened.what.endswith("without credentials anyone can read the pictures and list them and write over them")
    assert OpenBucket.objects == {}


class OpenBucket(BaseHTTPRequestHandler):
    """A bucket without access control, which SeaweedFS does not allow."""

    objects: ClassVar[dict[str, bytes]] = {}

    def do_PUT(self) -> None:
        self.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(b"")

    def do_GET(self) -> None:
        empty = b'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>'
        self._answer(empty if "list-type" in self.path else self.objects[self.path])

    def do_DELETE(self) -> None:
        del self.objects[self.path]
        self._answer(b"")

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_flower_of_celerys_own_without_a_password_is_a_warning(on_sqlite: Settings, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Celery's own Flower: the farm's refuses to run without a password. The broker does not matter.
    command = [sys.executable, "-m", "celery", "--broker=memory://", "flower", "--address=127.0.0.1", f"--port={port}"]
    settings = on_sqlite.model_copy(update={"flower_url": f"http://127.0.0.1:{port}"})
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as flower:
        try:
            wait_until(lambda: answers(port), "Flower is there", 60)
            wait_until(lambda: found(settings, "flower").level == "warn", "the doctor warns of it", 60)
            opened = found(settings, "flower")
        finally:
            flower.kill()
    assert opened.do == "give it a password"


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_farms_own_flower_refuses_to_run_without_a_password(on_sqlite: Settings, tmp_path: Path) -> None:
    env = {
        **os.environ,
        "FARM_DATABASE_URL": on_sqlite.database_url,
        "FARM_BROKER_URL": on_sqlite.broker_url,
        "FARM_S3_BUCKET": on_sqlite.s3_bucket,
    }
    done = subprocess.run(
        [sys.executable, "-m", "farm.queue.flower"], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "farm flower: Flower needs a password: FLOWER_BASIC_AUTH=user:password"


@pytest.mark.parametrize(
    ("location", "level"),
    [("/login?next=%2Ftasks", "ok"), ("https://elsewhere/tasks", "warn"), ("/flower/tasks/", "warn")],
)
def test_a_redirect_is_only_taken_for_a_login_if_it_leads_to_one(
    on_sqlite: Settings, location: str, level: str
) -> None:
    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", location)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with serving(Elsewhere) as url:
        assert found(on_sqlite.model_copy(update={"flower_url": url}), "flower").level == level


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run a web server in a thread."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()

"""`farm doctor`: looks at every part of the farm and says in a line each what is wrong and what to do."""

import contextlib
import http.client
import os
import secrets
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import boto3
import redis
import sqlalchemy as sa
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from rich.text import Text

from farm import __version__
from farm.errors import DatabaseUnavailable, FarmError, SchemaMismatch, StorageUnavailable
from farm.jobs.database import Database
from farm.jobs.schema import JobRow
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.local.home import SERVICE_VARIABLES, running
from farm.objects.storage import Storage, without_login
from farm.settings import EMBEDDED_FILE, Settings

SECOND_LOOK_SECONDS = 2.0
"""A dispatcher fills the window at least once in that time."""


@dataclass(frozen=True)
class Finding:
    """What the doctor found about one part."""

    part: str
    level: Literal["ok", "warn", "bad"]
    what: str
    do: str = ""
    """What to do about it; empty when all is well."""


def check(settings: Settings) -> list[Finding]:
    """Look at every part; takes a few seconds, and at most some more for each part that does not answer.

    It writes one small object to the bucket and deletes it again; nothing else is changed. Raises nothing: what can't
    be reached is a finding.
    """
    embedded = not SERVICE_VARIABLES & os.environ.keys() and (settings.home / EMBEDDED_FILE).exists()
    findings = [_settings(settings, embedded=embedded)]
    database = Database(settings.database_url)
    try:
        state = _database(database)
        findings.append(state)
        if findings[0].level == "bad":
            return findings  # an embedded farm that is down: nothing else can answer
        findings += _broker(settings)
        findings += _storage(settings)
        findings += _flower(settings)
        if state.level != "bad":
            try:
                store = JobStore(database, settings)
                findings += _dispatcher(settings, database, embedded=embedded)
                findings += _workers(store)
            except DatabaseUnavailable as error:
                findings.append(Finding("database", "bad", str(error), "look at the database's log"))
    finally:
        database.close()
    return findings


def line(finding: Finding) -> Text:
    """A finding as a person reads it."""
    mark, style = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "bad": ("✗", "bold red")}[finding.level]
    text = Text.assemble((mark, style), f" {finding.part}: {finding.what}")
    return text.append(f" → {finding.do}") if finding.do else text


def exit_code(findings: Iterable[Finding]) -> int:
    """1 if something is wrong, 0 if all is well or only worth a warning."""
    return int(any(finding.level == "bad" for finding in findings))


def _settings(settings: Settings, *, embedded: bool) -> Finding:
    if not embedded:
        return Finding("settings", "ok", f"from {os.environ.get('FARM_ENV_FILE', 'the environment')}")
    path = (settings.home / EMBEDDED_FILE).absolute()
    pid = running(settings.home)
    if pid is None:
        return Finding("settings", "bad", f"from {path}, but the farm there does not run", "start it: `farm up`")
    if path.stat().st_mode & 0o077:
        return Finding("settings", "warn", f"{path} holds passwords, and others can read it", f"chmod 600 {path}")
    return Finding("settings", "ok", f"from {path}, whose farm runs as process {pid}")


def _database(database: Database) -> Finding:
    shown = database.shown
    try:
        database.check_schema()
    except SchemaMismatch as error:
        return Finding("database", "bad", f"{shown}: {error}", "run `farm migrate` with the newest version in use")
    except FarmError as error:
        return Finding("database", "bad", str(error), "start it, or correct FARM_DATABASE_URL")
    return Finding("database", "ok", f"{shown} answers, and its schema is this version's")


def _broker(settings: Settings) -> Iterator[Finding]:
    url = urllib.parse.urlsplit(settings.broker_url)
    try:
        shown = f"{url.scheme}://{url.hostname}:{url.port or 6379}"
    except ValueError:  # whose text quotes what stands where the port should: mostly the password
        what = "FARM_BROKER_URL can't be read: redis://:password@host:port/0"
        yield Finding("broker", "bad", what, "write / ? # @ : in its password as %2F %3F %23 %40 %3A")
        return
    try:
        with _redis(settings.broker_url) as client:
            client.ping()
            policy = _eviction_policy(client)
    except redis.AuthenticationError as error:
        yield Finding("broker", "bad", f"{shown} refuses the password: {error}", "correct FARM_BROKER_URL")
        return
    except (redis.RedisError, OSError, ValueError) as error:
        yield Finding("broker", "bad", f"{shown} does not answer: {error}", "start Redis, or correct FARM_BROKER_URL")
        return
    if policy not in (None, "noeviction"):
        yield Finding(
            "broker",
            "warn",
            f"{shown} drops messages when its memory is full (maxmemory-policy {policy})",
            "set maxmemory-policy to noeviction",
        )
    if _open_to_all(url):
        yield Finding(
            "broker", "warn", f"{shown} answers without a password", "set requirepass, and keep it off open networks"
        )
    else:
        yield Finding("broker", "ok", f"{shown} answers, and asks for a password")


def _redis(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=3, decode_responses=True)


def _eviction_policy(client: redis.Redis) -> str | None:
    try:
        found = client.config_get("maxmemory-policy")
    except redis.ResponseError:  # managed services don't tell
        return None
    return str(found["maxmemory-policy"]) if isinstance(found, dict) and found else None


def _open_to_all(url: urllib.parse.SplitResult) -> bool:
    options = [pair for pair in urllib.parse.parse_qsl(url.query) if pair[0] not in ("username", "password")]
    bare = url._replace(netloc=url.netloc.rpartition("@")[2], query=urllib.parse.urlencode(options)).geturl()
    try:
        with _redis(bare) as client:
            return bool(client.ping())
    except (redis.RedisError, OSError):
        return False


def _storage(settings: Settings) -> Iterator[Finding]:
    where = f"{without_login(settings.s3_endpoint_url or 'AWS S3')}, bucket {settings.s3_bucket}"
    storage = Storage(settings)
    key, data = f".doctor-{secrets.token_hex(8)}", secrets.token_bytes(64)
    try:
        storage.ping()
        storage.put(key, data)
        try:
            same = storage.get(key) == data
            public = _what_anyone_may(settings, key)
        finally:
            storage.delete(key)
    except StorageUnavailable as error:
        yield Finding("storage", "bad", str(error), _remedy(error))
        return
    except FarmError as error:
        yield Finding("storage", "bad", f"{where}: what was written is not there: {error}", "look at the store's log")
        return
    finally:
        storage.close()
    if not same:
        yield Finding("storage", "bad", f"{where}: other bytes came back than were written", "look at the store's log")
    elif public:
        may = " and ".join(public)
        yield Finding("storage", "warn", f"{where}: without credentials anyone can {may}", "take away public access")
    else:
        yield Finding("storage", "ok", f"{where}: writes, reads and deletes, and refuses strangers")


def _remedy(error: StorageUnavailable) -> str:
    cause = error.__cause__
    code = cause.response["Error"].get("Code") if isinstance(cause, ClientError) else None
    if code == "NoSuchBucket":
        return "make the bucket, or correct FARM_S3_BUCKET"
    if code == "404":
        return "correct FARM_S3_ENDPOINT_URL, or start what is behind it: no object store answers there"
    if code is not None:
        return "correct the credentials (FARM_S3_ACCESS_KEY_ID and …_SECRET_ACCESS_KEY, or AWS_*) or their rights"
    return "start the store, or correct FARM_S3_ENDPOINT_URL"


def _what_anyone_may(settings: Settings, key: str) -> list[str]:
    """What a stranger can do in the bucket; where that is writing, it is done to the object of that key."""
    client = boto3.session.Session(region_name=settings.s3_region).client(
        "s3",
        endpoint_url=settings.s3_endpoint_url,
        config=Config(
            signature_version=UNSIGNED,
            request_checksum_calculation="when_required",
            connect_timeout=3,
            read_timeout=5,
            retries={"total_max_attempts": 1},
            s3={"addressing_style": "path" if settings.s3_endpoint_url else "auto"},
        ),
    )
    bucket = settings.s3_bucket
    tries: dict[str, Callable[[], object]] = {
        "read the pictures": lambda: client.get_object(Bucket=bucket, Key=key)["Body"].close(),
        "list them": lambda: client.list_objects_v2(Bucket=bucket, MaxKeys=1),
        "write over them": lambda: client.put_object(Bucket=bucket, Key=key, Body=b"from a stranger"),
    }
    found = []
    for what, attempt in tries.items():
        with contextlib.suppress(ClientError, BotoCoreError):
            attempt()
            found.append(what)
    client.close()
    return found


def _flower(settings: Settings) -> Iterator[Finding]:
    if not settings.flower_url:
        return
    url = urllib.parse.urlsplit(settings.flower_url)
    shown = without_login(settings.flower_url)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    try:
        connection = kind(url.hostname or "", url.port, timeout=5)
    except (ValueError, http.client.HTTPException):
        yield Finding("flower", "bad", "FARM_FLOWER_URL can't be read", "write it like http://host:5555")
        return
    try:
        connection.request("GET", f"{url.path.rstrip('/')}/tasks")
        answer = connection.getresponse()
        status, location = answer.status, answer.getheader("Location", "")
    except (OSError, http.client.HTTPException) as error:
        yield Finding("flower", "bad", f"{shown} does not answer: {error}", "start it, or correct FARM_FLOWER_URL")
        return
    finally:
        connection.close()
    if status == http.client.OK:
        yield Finding("flower", "warn", f"{shown} lets anyone in, and in it one can stop workers", "give it a password")
    elif http.client.MULTIPLE_CHOICES <= status < http.client.BAD_REQUEST and _same_page(location):
        do = "set FARM_FLOWER_URL to where it leads"
        yield Finding("flower", "warn", f"{shown} only leads to {without_login(location)}", do)
    elif status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN, http.client.FOUND):
        yield Finding("flower", "ok", f"{shown} answers, and asks who is there")
    else:
        yield Finding("flower", "bad", f"{shown} answers with HTTP {status}", "look at its log")


def _same_page(location: str) -> bool:
    """Whether a redirect leads to the page that was asked for at another address, and not to where one logs in."""
    return urllib.parse.urlsplit(location).path.rstrip("/").endswith("/tasks")


def _dispatcher(settings: Settings, database: Database, *, embedded: bool) -> Iterator[Finding]:
    if embedded:
        from farm.local.process import alive

        if alive(settings.home, "dispatcher"):
            yield Finding("dispatcher", "ok", "runs")
        else:
            yield Finding("dispatcher", "bad", "does not run", f"look at {settings.home / 'logs' / 'dispatcher.log'}")
        return
    # Nothing says where a dispatcher runs, but its absence shows: jobs stay in the backlog while Redis has room.
    stuck = _left_behind(settings, database)
    if stuck:
        threading.Event().wait(SECOND_LOOK_SECONDS)
        stuck &= _left_behind(settings, database)
    if stuck:
        yield Finding(
            "dispatcher",
            "bad",
            f"jobs stay in the backlog though there is room for them in Redis (models {', '.join(sorted(stuck))})",
            "start one: `farm dispatcher`",
        )
    else:
        yield Finding("dispatcher", "ok", "no job stays behind in the backlog")


def _left_behind(settings: Settings, database: Database) -> set[str]:
    """The models with jobs in the backlog while fewer than a window of them lie in Redis."""
    # The states stand in the text: neither database uses a partial index for a value that it can't see.
    pending = sa.select(JobRow.model).where(sa.text(f"state = '{JobState.PENDING}'")).distinct()
    queued = sa.select(JobRow.model, sa.func.count()).where(sa.text(f"state = '{JobState.QUEUED}'"))
    with database.read() as session:
        lying = dict(session.execute(queued.group_by(JobRow.model)).all())
        return {model for model in session.scalars(pending) if lying.get(model, 0) < settings.window}


def _workers(store: JobStore) -> Iterator[Finding]:
    workers = store.workers()
    held = {model.name for worker in workers if worker.alive for model in worker.models}
    for worker in workers:
        models = ", ".join(model.name for model in worker.models)
        if not worker.alive:
            yield Finding(
                "worker", "warn", f"{worker.name} has not been heard of lately", "look whether it runs; restart it"
            )
        elif worker.version != __version__:
            yield Finding(
                "worker", "warn", f"{worker.name} runs version {worker.version}, this is {__version__}", "upgrade one"
            )
        else:
            yield Finding("worker", "ok", f"{worker.name} on {worker.device}, {worker.slots} slots, holds {models}")
    if not any(worker.alive for worker in workers):
        yield Finding("worker", "bad", "none is alive", "start one: `farm worker`")
    for model, count in sorted(store.waiting_by_model().items()):
        if model not in held:
            yield Finding(
                "models",
                "bad",
                f"{count} jobs wait for {model!r}, which no live worker holds",
                f"start a worker with FARM_MODELS={model}=…, or cancel them",
            )

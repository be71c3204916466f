"""Checks of Redis and Flower: whether they answer, and require a password."""

import http.client
import urllib.parse
from collections.abc import Iterator

import redis

from farm.objects.storage import without_login
from farm.runtime.finding import Finding
from farm.settings import Settings


def check_broker(settings: Settings) -> Iterator[Finding]:
    """Check that Redis answers, requires a password, and never evicts messages."""
    url = urllib.parse.urlsplit(settings.broker_url)
    try:
        shown = f"{url.scheme}://{url.hostname}:{url.port or 6379}"
    except ValueError:  # its message quotes the invalid port, which is mostly part of the password
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
    if _answers_without_password(url):
        yield Finding(
            "broker", "warn", f"{shown} answers without a password", "set requirepass, and keep it off open networks"
        )
    else:
        yield Finding("broker", "ok", f"{shown} answers, and asks for a password")


def check_flower(settings: Settings) -> Iterator[Finding]:
    """Check that Flower, if configured, answers and requires a password."""
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
        yield Finding("flower", "warn", f"{shown} has no login: anyone can stop workers in it", "give it a password")
    elif http.client.MULTIPLE_CHOICES <= status < http.client.BAD_REQUEST and _is_moved_page(location):
        do = "set FARM_FLOWER_URL to that address"
        yield Finding("flower", "warn", f"{shown} only redirects to {without_login(location)}", do)
    elif status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN, http.client.FOUND):
        yield Finding("flower", "ok", f"{shown} answers, and requires a login")
    else:
        yield Finding("flower", "bad", f"{shown} answers with HTTP {status}", "look at its log")


def _redis(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=3, decode_responses=True)


def _eviction_policy(client: redis.Redis) -> str | None:
    try:
        found = client.config_get("maxmemory-policy")
    except redis.ResponseError:  # managed services refuse CONFIG
        return None
    return str(found["maxmemory-policy"]) if isinstance(found, dict) and found else None


def _answers_without_password(url: urllib.parse.SplitResult) -> bool:
    options = [pair for pair in urllib.parse.parse_qsl(url.query) if pair[0] not in ("username", "password")]
    bare = url._replace(netloc=url.netloc.rpartition("@")[2], query=urllib.parse.urlencode(options)).geturl()
    try:
        with _redis(bare) as client:
            return bool(client.ping())
    except (redis.RedisError, OSError):
        return False


def _is_moved_page(location: str) -> bool:
    """Whether a redirect leads to the same page at another address, not to a login page."""
    return urllib.parse.urlsplit(location).path.rstrip("/").endswith("/tasks")

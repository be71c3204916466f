"""A row a batch in Flower: how far it is, how fast it goes, when it ends."""

import logging
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from farm.errors import BrokerUnavailable, ServiceUnavailable
from farm.jobs.leadership import Leadership
from farm.jobs.records import BatchStatus
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.queue.broker import make_app
from farm.runtime.backoff import Backoff
from farm.runtime.terminal_text import printable
from farm.settings import Settings
from farm.show.progress_text import duration, jobs_line

log = logging.getLogger(__name__)

NAME = "batch"
"""What Flower takes for the task's name."""
MOST = 200
"""At how many batches a look is that move, at most, and at how many of the others, in turn; and how many it tells."""
AGAIN_SECONDS = 5.0
"""How soon a batch that moves is told of again where nothing has ended: its rate falls, or Flower has missed it."""
_ENDED_SECONDS, _ENDED_EVERY = 600.0, 60
"""Batches that ended so lately are told of anew at every sixtieth look: Flower may have been away when they did."""
_ENDED_KEPT = 1000
_HEARTBEAT_SECONDS = 10

Event = tuple[str, dict[str, Any]]
"""Its type, as Celery calls it, and its fields."""


class BatchRows:
    """Tells Flower of batches as if each were a task; in one thread, of the dispatcher that leads.

    Each event says all there is to its row: whoever begins to tell, or to listen, needs nothing from before. What can't
    be told is told at a later look, and nobody waits for it. A look costs by the batches that move and a few hundred
    others, not by jobs.
    """

    def __init__(self, store: JobStore, settings: Settings) -> None:
        self._store = store
        self._seconds = settings.progress_seconds
        self._bucket = settings.s3_bucket
        self._stream = EventStream(settings)
        self._backoff = Backoff(1.0, 30.0)
        self._start_anew()

    def _start_anew(self) -> None:
        self._open: dict[str, tuple[object, float]] = {}  # what was told last of those that had not ended, and when
        self._ended: dict[str, object] = {}  # the same of some that had
        self._models: dict[str, str] = {}
        self._place: tuple[datetime, str] | None = None
        self._looks = 0

    def run(self, stop: threading.Event, leadership: Leadership) -> None:
        """Look again and again while this process leads, until `stop` is set; an outage is logged once."""
        if self._seconds is None:
            return
        pause, failures = self._seconds, 0
        while not stop.wait(pause):
            pause = self._seconds
            if not leadership.leads:
                self._start_anew()  # another one tells meanwhile
                continue
            try:
                self.look(time.monotonic())
                failures = 0
            except ServiceUnavailable as error:
                failures += 1
                if failures == 1:
                    log.warning("can't tell Flower of the batches, trying again: %s", error)
                pause = max(pause, self._backoff.seconds(failures))
            except Exception:
                log.exception("can't tell Flower of the batches")
                pause = max(pause, self._backoff.max_seconds)
        self._stream.close()

    def look(self, at: float) -> int:
        """Tell of the batches that have changed, at a time of `time.monotonic`; returns how many events that were.

        Raises `ServiceUnavailable`, after which all of it is told at the next look.
        """
        again = frozenset(self._store.just_ended(_ENDED_SECONDS, MOST) if self._looks % _ENDED_EVERY == 0 else ())
        moving = frozenset(self._store.moving(MOST))
        looked_at = [*{**dict.fromkeys(moving), **dict.fromkeys(self._others()), **dict.fromkeys(again)}]
        found = self._store.statuses(looked_at)
        events: list[Event] = []
        marks: dict[str, object] = {}
        for batch_id in self._longest_untold_first(looked_at):
            status = found.get(batch_id)
            if status is None:
                events += _gone(batch_id) if batch_id in self._open else ()
                marks[batch_id] = None
                continue
            mark: object = (tuple(status.counts.items()), status.paused)
            known, told_at = self._open.get(batch_id) or (self._ended.get(batch_id), at)
            if known == mark and batch_id not in again and not (batch_id in moving and at - told_at >= AGAIN_SECONDS):
                continue
            events += self._events(status)
            marks[batch_id] = mark
            if len(marks) == MOST:
                break
        self._stream.send(events, at)
        self._looks += 1
        for batch_id, mark in marks.items():
            self._remember(batch_id, mark, at, found.get(batch_id))
        return len(events)

    def _others(self) -> Iterator[str]:
        """Some of the batches that have not ended, in turn, and of those that had not when they were told of last."""
        page = self._store.open_batches(MOST, self._place)
        self._place = page[-1] if len(page) == MOST else None
        yield from (batch_id for _, batch_id in page)
        known = list(self._open)
        start = self._looks * MOST % len(known) if len(known) > MOST else 0
        yield from known[start : start + MOST]

    def _longest_untold_first(self, batch_ids: Sequence[str]) -> list[str]:
        return sorted(batch_ids, key=lambda batch_id: self._open.get(batch_id, (None, 0.0))[1])

    def _remember(self, batch_id: str, mark: object, at: float, status: BatchStatus | None) -> None:
        self._open.pop(batch_id, None)
        self._ended.pop(batch_id, None)
        if status is not None and not status.done:
            self._open[batch_id] = mark, at
            return
        self._models.pop(batch_id, None)
        if status is not None:
            self._ended[batch_id] = mark
            while len(self._ended) > _ENDED_KEPT:
                del self._ended[next(iter(self._ended))]

    def _events(self, status: BatchStatus) -> Iterator[Event]:
        row = {
            "uuid": status.id,
            "name": NAME,
            "kwargs": self._shown(status),
            "received": status.created_at.timestamp(),
            "started": status.created_at.timestamp(),
        }
        if not status.done:
            if status.id not in self._open:
                # Flower would not take a batch whose failed jobs are tried anew for one that goes on.
                yield "task-retried", row
            line = jobs_line(status.ended, status.total, self._store.tempo(status), note(status))
            yield "task-progress", {**row, "result": line}
            return
        took = (status.finished_at - status.created_at).total_seconds() if status.finished_at else 0.0
        succeeded, failed = status.counts[JobState.SUCCEEDED], status.counts[JobState.FAILED]
        where = f"in s3://{self._bucket}/{status.id}/" if succeeded else ""
        words = (f"{succeeded}/{status.total} pictures", where, f"after {duration(took)}", note(status))
        row |= {"result": " ".join(filter(None, words)), "runtime": took}
        if failed:
            yield "task-failed", {**row, "exception": f"{failed} of {status.total} failed"}
        elif succeeded:
            yield "task-succeeded", row
        else:
            yield from _revoked(row)

    def _shown(self, status: BatchStatus) -> str:
        models = self._models.get(status.id)
        if models is None:
            models = self._models[status.id] = ", ".join(self._store.models_of(status.id))
        jobs = f"{status.total} job{'s' * (status.total != 1)}"
        return printable(f"{status.name[:80]}: {jobs} of {status.owner[:40]} (model {models[:200]})")


def note(status: BatchStatus) -> str:
    """What is out of the ordinary with a batch, in few words: `2 failed, 1 cancelled, paused`."""
    odd = (JobState.FAILED, JobState.CANCELLED)
    words = [f"{status.counts[state]} {state}" for state in odd if status.counts[state]]
    if status.paused and not status.done:
        words.append("paused")
    return ", ".join(words)


def _gone(batch_id: str) -> Iterator[Event]:
    yield from _revoked({"uuid": batch_id, "name": NAME, "result": "deleted"})


def _revoked(row: dict[str, Any]) -> Iterator[Event]:
    # Alone it would not end what makes progress: a revoked task can come before that.
    yield "task-retried", row
    yield "task-revoked", row


class EventStream:
    """What Flower listens to, over a connection of its own that is opened at need."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._app: Any = None
        self._connection: Any = None
        self._events: Any = None
        self._heartbeat = float("-inf")

    def send(self, events: Sequence[Event], at: float) -> None:
        """Send these, in this order, as one message; and now and then a sign of life. Raises `BrokerUnavailable`."""
        if not events and at - self._heartbeat < _HEARTBEAT_SECONDS:
            return
        try:
            if self._events is None:
                self._open()
            for kind, fields in events:
                self._events.send(kind, **fields)
            self._events.flush()
            if at - self._heartbeat >= _HEARTBEAT_SECONDS:
                # Flower takes whoever sends for a worker, and one without it for dead.
                self._events.send("worker-heartbeat", freq=_HEARTBEAT_SECONDS)
                self._heartbeat = at
        except Exception as error:
            self._drop()
            raise BrokerUnavailable(f"Redis does not take events: {error}") from error

    def _open(self) -> None:
        if self._app is None:
            self._app = make_app(self._settings)
        self._connection = self._app.connection_for_write()
        self._connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
        self._events = self._app.events.Dispatcher(
            channel=self._connection.channel(),
            hostname=f"dispatcher@{socket.gethostname()}",
            buffer_group=["task"],
            buffer_limit=10 * MOST,
            buffer_while_offline=False,
        )

    def _drop(self) -> None:
        connection, self._connection, self._events = self._connection, None, None
        if connection is not None:
            try:
                connection.release()
            except Exception as error:  # noqa: BLE001 - it is broken, and nobody needs it any more
                log.debug("can't close the connection for events: %s", error)

    def close(self) -> None:
        """Say goodbye, and close the connection."""
        try:
            if self._events is not None:
                self._events.send("worker-offline")
        except Exception as error:  # noqa: BLE001 - whoever misses it finds out
            log.debug("can't say goodbye to Flower: %s", error)
        self._drop()

"""A row for each batch in Flower: its progress, its rate and its remaining time."""

import logging
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from farm.errors import BrokerUnavailable, ServiceUnavailable
from farm.jobs.leadership import Leadership
from farm.jobs.overview import Overview
from farm.jobs.records import BatchStatus
from farm.jobs.states import JobState
from farm.queue.broker import make_app
from farm.runtime.backoff import Backoff
from farm.runtime.terminal_text import printable
from farm.settings import Settings
from farm.show.progress_text import duration, jobs_line

log = logging.getLogger(__name__)

NAME = "batch"
"""The task name that Flower shows."""
MOST = 200
"""The most active batches, and the most other batches in turn, that an update reads; the most that it sends."""
AGAIN_SECONDS = 5.0
"""When an active batch is sent again without a change: its rate falls, or Flower missed the last event."""
_ENDED_SECONDS, _ENDED_EVERY = 600.0, 60
"""Every sixtieth update sends recently ended batches again: Flower may have been away when they ended."""
_ENDED_KEPT = 1000
_HEARTBEAT_SECONDS = 10

Event = tuple[str, dict[str, Any]]
"""Celery's event type, and the event's fields."""


class BatchRows:
    """Sends batches to Flower as tasks, from one thread of the leading dispatcher.

    Each event contains the whole row, so neither a new dispatcher nor a restarted Flower needs earlier events. Unsent
    events are sent with a later update. The cost of an update depends on the number of active batches and a few hundred
    others, not on the number of jobs.
    """

    def __init__(self, overview: Overview, settings: Settings) -> None:
        self._overview = overview
        self._seconds = settings.progress_seconds
        self._bucket = settings.s3_bucket
        self._stream = EventStream(settings)
        self._backoff = Backoff(1.0, 30.0)
        self._reset()

    def _reset(self) -> None:
        self._open: dict[str, tuple[object, float]] = {}  # the last state sent for each open batch, and its time
        self._ended: dict[str, object] = {}  # the last state sent for some ended batches
        self._models: dict[str, str] = {}
        self._place: tuple[datetime, str] | None = None
        self._updates = 0

    def run(self, stop: threading.Event, leadership: Leadership) -> None:
        """Update the rows while this process leads, until `stop` is set; logs an outage once."""
        if self._seconds is None:
            return
        pause, failures = self._seconds, 0
        while not stop.wait(pause):
            pause = self._seconds
            if not leadership.leads:
                self._reset()  # another dispatcher sends events meanwhile
                continue
            try:
                self.update(time.monotonic())
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

    def update(self, at: float) -> int:
        """Send the batches that changed, at a time of `time.monotonic`; returns the number of events.

        Raises `ServiceUnavailable`; the next update sends the same batches.
        """
        again = frozenset(self._overview.just_ended(_ENDED_SECONDS, MOST) if self._updates % _ENDED_EVERY == 0 else ())
        moving = frozenset(self._overview.moving(MOST))
        batch_ids = [*{**dict.fromkeys(moving), **dict.fromkeys(self._others()), **dict.fromkeys(again)}]
        found = self._overview.statuses(batch_ids)
        events: list[Event] = []
        marks: dict[str, object] = {}
        for batch_id in self._least_recently_sent_first(batch_ids):
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
        self._updates += 1
        for batch_id, mark in marks.items():
            self._remember(batch_id, mark, at, found.get(batch_id))
        return len(events)

    def _others(self) -> Iterator[str]:
        """The next page of open batches, and the next page of batches that were open when last sent."""
        page = self._overview.open_batches(MOST, self._place)
        self._place = page[-1] if len(page) == MOST else None
        yield from (batch_id for _, batch_id in page)
        known = list(self._open)
        start = self._updates * MOST % len(known) if len(known) > MOST else 0
        yield from known[start : start + MOST]

    def _least_recently_sent_first(self, batch_ids: Sequence[str]) -> list[str]:
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
                # Without it Flower keeps a batch with retried jobs in its terminal state.
                yield "task-retried", row
            line = jobs_line(status.ended, status.total, self._overview.tempo(status), note(status))
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
            models = self._models[status.id] = ", ".join(self._overview.models_of(status.id))
        jobs = f"{status.total} job{'s' * (status.total != 1)}"
        return printable(f"{status.name[:80]}: {jobs} of {status.owner[:40]} (model {models[:200]})")


def note(status: BatchStatus) -> str:
    """A batch's failures, cancellations and pause: `2 failed, 1 cancelled, paused`; empty if it has none."""
    odd = (JobState.FAILED, JobState.CANCELLED)
    words = [f"{status.counts[state]} {state}" for state in odd if status.counts[state]]
    if status.paused and not status.done:
        words.append("paused")
    return ", ".join(words)


def _gone(batch_id: str) -> Iterator[Event]:
    yield from _revoked({"uuid": batch_id, "name": NAME, "result": "deleted"})


def _revoked(row: dict[str, Any]) -> Iterator[Event]:
    # A revoked event alone does not end a task in progress, since Celery may revoke a task before it starts.
    yield "task-retried", row
    yield "task-revoked", row


class EventStream:
    """Sends events to Flower over a connection of its own, opened when needed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._app: Any = None
        self._connection: Any = None
        self._events: Any = None
        self._heartbeat = float("-inf")

    def send(self, events: Sequence[Event], at: float) -> None:
        """Send events in order as one message, with a heartbeat when due. Raises `BrokerUnavailable`."""
        if not events and at - self._heartbeat < _HEARTBEAT_SECONDS:
            return
        try:
            if self._events is None:
                self._open()
            for kind, fields in events:
                self._events.send(kind, **fields)
            self._events.flush()
            if at - self._heartbeat >= _HEARTBEAT_SECONDS:
                # Flower treats each sender as a worker, and a sender without heartbeats as dead.
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
            except Exception as error:  # noqa: BLE001 - the connection is broken and no longer needed
                log.debug("can't close the connection for events: %s", error)

    def close(self) -> None:
        """Report this sender offline, and close the connection."""
        try:
            if self._events is not None:
                self._events.send("worker-offline")
        except Exception as error:  # noqa: BLE001 - Flower notices the missing heartbeats
            log.debug("can't report this sender offline: %s", error)
        self._drop()

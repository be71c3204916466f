"""The loop that reports batches to Flower, and its events over a real Redis."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from farm.dispatch.batch_rows import BatchRows, EventStream
from farm.errors import BrokerUnavailable
from farm.jobs.leadership import Leadership
from farm.queue.broker import make_app
from farm.settings import Settings
from tests.integration.conftest import wait_until
from tests.unit.farm.dispatch.conftest import Parts, Turns


class Recorder(EventStream):
    """A stream that records the batches it is sent, and that a test can make fail."""

    fails: Exception | None = None

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.sent: list[list[str]] = []
        self.closed = False

    def send(self, events: Any, at: float) -> None:
        """Record the batches of the events."""
        if self.fails is not None:
            raise self.fails
        self.sent.append([fields["uuid"] for _, fields in events])

    def close(self) -> None:
        """Record that the stream was closed."""
        self.closed = True


def nothing() -> None:
    """A step in which the loop only continues."""


def rows(parts: Parts, stream: EventStream | None = None, **settings: Any) -> BatchRows:
    """Return the rows of a dispatcher that sends progress once a second."""
    found = BatchRows(parts.store.overview, parts.settings.model_copy(update={"progress_seconds": 1.0, **settings}))
    if stream is not None:
        found._stream = stream
    return found


def run(parts: Parts, leadership: Leadership, stream: EventStream, *steps: Callable[[], object]) -> list[float]:
    """Run the loop with a step at each pause; returns the pauses."""
    turns = Turns(parts.clock, *steps)
    rows(parts, stream).run(turns, leadership)
    return turns.pauses


@pytest.fixture
def stream(parts: Parts) -> Recorder:
    return Recorder(parts.settings)


def test_nothing_is_shown_where_progress_is_switched_off(parts: Parts, leadership: Leadership) -> None:
    turns = Turns(parts.clock, nothing)
    rows(parts, progress_seconds=None).run(turns, leadership)
    assert turns.pauses == []


def test_only_the_leader_shows_batches(parts: Parts, leadership: Leadership, stream: Recorder) -> None:
    (job,) = parts.submit(1)
    batch_id = job.rpartition("-")[0]
    pauses = run(parts, leadership, stream, nothing, leadership.seek, nothing, leadership.resign, nothing)
    assert [batches for batches in stream.sent if batches] == [[batch_id] * 2]
    assert pauses == [1.0] * 6
    assert stream.closed


def test_a_dispatcher_that_leads_again_shows_every_batch_again(
    parts: Parts, leadership: Leadership, stream: Recorder
) -> None:
    parts.submit(1)
    run(parts, leadership, stream, leadership.seek, leadership.resign, leadership.seek, nothing)
    assert [len(batches) for batches in stream.sent if batches] == [2, 2]


def test_redis_away_is_logged_once_and_asked_less_and_less_often(
    parts: Parts, leadership: Leadership, stream: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    parts.submit(1)
    leadership.seek()
    stream.fails = BrokerUnavailable("the test says so")

    def come_back() -> None:
        assert stream.sent == []
        stream.fails = None

    pauses = run(parts, leadership, stream, *[nothing] * 6, come_back, nothing)
    assert caplog.text.count("can't tell Flower of the batches") == 1
    assert max(pauses) > 10
    assert pauses[-1] == 1.0
    assert len(stream.sent) >= 1
    assert len(stream.sent[0]) == 2, "what could not be sent is sent now"


def test_an_error_that_nobody_expected_does_not_end_the_loop(
    parts: Parts, leadership: Leadership, stream: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    parts.submit(1)
    leadership.seek()
    stream.fails = ZeroDivisionError("nobody has thought of that")

    def mend() -> None:
        stream.fails = None

    assert run(parts, leadership, stream, nothing, mend, nothing) == [1.0, 30.0, 1.0, 1.0]
    assert "ZeroDivisionError" in caplog.text
    assert len(stream.sent) >= 1


def test_sql_away_is_waited_out(parts: Parts, leadership: Leadership, stream: Recorder) -> None:
    parts.submit(1)
    leadership.seek()
    start, end = parts.sql_outage()
    run(parts, leadership, stream, lambda: (start(), None), lambda: (end(), None), nothing)
    assert len(stream.sent[0]) == 2


# --- over Redis -----------------------------------------------------------------------------------------------------


@contextmanager
def received(settings: Settings) -> Iterator[list[dict[str, Any]]]:
    """Collect the events that arrive over Redis during the block."""
    app = make_app(settings)
    events: list[dict[str, Any]] = []
    listening = threading.Event()
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": events.append})
        receiver.on_consume_ready = lambda *_, **__: listening.set()

        def listen() -> None:
            for _ in receiver.consume(safety_interval=0.1):
                pass

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            assert listening.wait(30)
            yield events
        finally:
            receiver.should_stop = True
            thread.join()
    app.close()


def event(batch_id: str = "b-1") -> Sequence[tuple[str, dict[str, Any]]]:
    return [("task-progress", {"uuid": batch_id, "name": "batch", "result": "1/2"})]


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [one["type"] for one in events]


def test_events_are_followed_by_a_heartbeat_when_one_is_due_and_by_a_goodbye(parts: Parts) -> None:
    stream = EventStream(parts.settings)
    with received(parts.settings) as events:
        for at in (0.0, 5.0, 10.0):
            stream.send(event(), at)
        stream.send((), 15.0)  # no events, and no heartbeat due
        stream.send((), 20.0)
        stream.close()
        wait_until(lambda: "worker-offline" in kinds(events), "it says goodbye")
    progress, heartbeat = "task-progress", "worker-heartbeat"
    assert kinds(events) == [progress, heartbeat, progress, progress, heartbeat, heartbeat, "worker-offline"]
    assert {one["hostname"].partition("@")[0] for one in events} == {"dispatcher"}


def test_a_stream_that_sent_nothing_has_nothing_to_close(parts: Parts) -> None:
    EventStream(parts.settings).close()


def test_without_redis_sending_fails_and_closing_does_not(parts: Parts) -> None:
    nowhere = parts.settings.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"})
    stream = EventStream(nowhere)
    with pytest.raises(BrokerUnavailable, match="Redis does not take events"):
        stream.send(event(), 0.0)
    stream.close()


def test_a_broken_connection_is_dropped_and_opened_anew(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = EventStream(parts.settings)
    stream.send(event("first"), 0.0)

    def broken(*_: object, **__: object) -> None:
        raise ConnectionResetError("the test says so")

    with received(parts.settings) as events:
        with monkeypatch.context() as patch:
            patch.setattr(stream._events, "flush", broken)
            patch.setattr(stream._connection, "release", broken)
            with pytest.raises(BrokerUnavailable):
                stream.send(event("second"), 1.0)
        stream.send(event("third"), 2.0)
        wait_until(lambda: "third" in [one.get("uuid") for one in events], "it sends again")
    stream.close()


def test_a_goodbye_that_can_not_be_said_does_no_harm(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = EventStream(parts.settings)
    stream.send(event(), 0.0)

    def broken(*_: object, **__: object) -> None:
        raise ConnectionResetError("the test says so")

    monkeypatch.setattr(stream._events, "send", broken)
    stream.close()
    assert stream._connection is None

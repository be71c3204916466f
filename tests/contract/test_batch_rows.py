"""The events that describe batches to Flower, on every database, and the rows that Flower makes of them."""

import itertools
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from celery.events.state import State

from farm.dispatch import batch_rows
from farm.dispatch.batch_rows import AGAIN_SECONDS, BatchRows, Event
from farm.errors import BrokerUnavailable, ErrorClass
from farm.jobs.database import Database
from farm.jobs.records import Pace, Picture
from farm.jobs.states import JobState
from farm.jobs.store import JobStore
from farm.settings import Settings
from farm.specs.spec import RenderSpec

SETTINGS = Settings(database_url="", broker_url="", s3_bucket="farm", retry_seconds=0, window=4096)
PICTURE = Picture("b/1.png", "f" * 64, 123, 64, 64, "e" * 64, 1.0)


class Flower:
    """Records the events it receives and applies them to Celery's own task state, which Flower displays."""

    def __init__(self) -> None:
        self.told: list[Event] = []
        self.state = State()
        self._clock = itertools.count(1)

    def send(self, events: Sequence[Event], at: float) -> None:
        self.told += events
        for kind, fields in events:
            moment = {"timestamp": 1e9 + at, "local_received": 1e9 + at, "clock": next(self._clock)}
            self.state.event({"type": kind, "hostname": "dispatcher@host", **fields, **moment})

    def row(self, batch_id: str) -> Any:
        return self.state.tasks[batch_id]

    def shown(self, batch_id: str) -> tuple[str, str]:
        return self.row(batch_id).state, self.row(batch_id).result


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore.over(database, SETTINGS)


@pytest.fixture
def flower() -> Flower:
    return Flower()


@pytest.fixture
def rows(store: JobStore, flower: Flower) -> BatchRows:
    return telling(store, flower)


def telling(store: JobStore, flower: Flower) -> BatchRows:
    rows = BatchRows(store.overview, SETTINGS)
    rows._stream = flower  # type: ignore[assignment]
    return rows


def specs(count: int) -> Iterator[RenderSpec]:
    return (RenderSpec(prompt=f"prompt {n}", num_inference_steps=20) for n in range(count))


def submitted(store: JobStore, count: int = 3, name: str = "sea") -> str:
    return store.submissions.submit(name, "anna", 50, specs(count))


def render(store: JobStore, batch_id: str, *indices: int, error: str | None = None) -> None:
    store.backlog.enqueue(99)
    for index in indices:
        claim = store.leases.claim(f"{batch_id}-{index}", "w1@host")
        assert claim is not None
        if error is None:
            assert store.attempts.succeed(claim, replace(PICTURE, key=f"{batch_id}/{index}.png"))
        else:
            assert store.attempts.fail(claim, error, ErrorClass.BAD_INPUT)


def test_a_batch_has_a_row_from_its_submission_to_its_end(store: JobStore, rows: BatchRows, flower: Flower) -> None:
    batch_id = submitted(store)
    rows.update(0.0)
    assert flower.shown(batch_id) == ("PROGRESS", "░░░░░░░░░░░░ 0/3 0%")
    row = flower.row(batch_id)
    assert (row.name, row.kwargs) == ("batch", "sea: 3 jobs of anna (model tiny)")
    assert row.received == pytest.approx(store.queries.batch(batch_id).created_at.timestamp())
    render(store, batch_id, 1)
    rows.update(1.0)
    assert flower.shown(batch_id)[1].startswith("████░░░░░░░░ 1/3 33%")
    render(store, batch_id, 2, error="no such sampler")
    rows.update(2.0)
    state, result = flower.shown(batch_id)
    assert state == "PROGRESS"
    assert result.startswith("████████░░░░ 2/3 66% ")
    assert "/s ETA " in result or "/min ETA" in result
    assert result.endswith("1 failed")
    render(store, batch_id, 3)
    rows.update(3.0)
    state, result = flower.shown(batch_id)
    assert state == "FAILURE"
    assert result.startswith(f"2/3 pictures in s3://farm/{batch_id}/ after ")
    assert flower.row(batch_id).exception == "1 of 3 failed"


def test_a_row_is_sent_when_its_batch_has_changed(store: JobStore, rows: BatchRows, flower: Flower) -> None:
    moves, waits = submitted(store, 2), submitted(store, 2, "waits")
    store.steering.pause(batch_id=waits)
    render(store, moves, 1)
    assert rows.update(0.0) == 4  # two new batches; a new row takes two events, the first resets a terminal state
    assert flower.shown(waits)[1].endswith("paused")
    assert rows.update(1.0) == 0
    assert rows.update(AGAIN_SECONDS + 1) == 1  # the rate of a running batch falls while no job ends
    assert flower.told[-1][1]["uuid"] == moves
    render(store, moves, 2)
    assert rows.update(AGAIN_SECONDS + 2) == 1
    assert flower.shown(moves)[0] == "SUCCESS"
    assert rows.update(AGAIN_SECONDS + 3) == 0
    store.steering.resume(batch_id=waits)
    assert rows.update(AGAIN_SECONDS + 4) == 1


def test_the_measured_steps_tell_an_eta_before_the_first_picture(
    store: JobStore, rows: BatchRows, flower: Flower
) -> None:
    batch_id = submitted(store, 4)
    store.backlog.enqueue(99)
    claims = [store.leases.claim(f"{batch_id}-{index}", "w1@host") for index in (1, 2)]
    store.leases.beat("w1@host", {(claim.job_id, claim.attempt): Pace(1, 0.5) for claim in claims if claim})
    rows.update(0.0)
    assert flower.shown(batch_id)[1] == "░░░░░░░░░░░░ 0/4 0% 12.0/min ETA 20s"


def test_the_next_leader_neither_loses_nor_duplicates_a_row(store: JobStore, flower: Flower) -> None:
    first = telling(store, flower)
    ends, goes_on = submitted(store, 1), submitted(store, 2, "goes on")
    first.update(0.0)
    render(store, ends, 1)  # no dispatcher sends events meanwhile
    at = store.endings.last_ended_at(ends)
    assert at is not None
    assert store.endings.note(ends, at)
    render(store, goes_on, 1)
    telling(store, flower).update(100.0)
    assert sorted(flower.state.tasks) == sorted([ends, goes_on])
    assert flower.shown(ends)[0] == "SUCCESS"
    assert flower.shown(goes_on)[1].startswith("██████░░░░░░ 1/2 50%")
    before = flower.shown(ends), flower.row(ends).runtime
    telling(store, flower).update(200.0)  # sending the same events again changes nothing
    assert (flower.shown(ends), flower.row(ends).runtime) == before


def test_a_batch_whose_failed_jobs_are_tried_anew_goes_on(store: JobStore, rows: BatchRows, flower: Flower) -> None:
    batch_id = submitted(store, 1)
    render(store, batch_id, 1, error="no such sampler")
    rows.update(0.0)
    assert flower.shown(batch_id)[0] == "FAILURE"
    store.steering.retry(batch_id=batch_id)
    rows.update(1.0)
    assert flower.shown(batch_id) == ("PROGRESS", "░░░░░░░░░░░░ 0/1 0%")
    render(store, batch_id, 1)
    rows.update(2.0)
    assert flower.shown(batch_id)[0] == "SUCCESS"


def test_what_is_cancelled_or_deleted_does_not_stay_under_way(store: JobStore, rows: BatchRows, flower: Flower) -> None:
    cancelled, deleted = submitted(store), submitted(store)
    rows.update(0.0)
    store.steering.cancel(batch_id=cancelled)
    store.deletions.mark(deleted, cancel=True)
    rows.update(1.0)
    state, result = flower.shown(cancelled)
    assert state == "REVOKED"
    assert re.fullmatch(r"0/3 pictures after \d+s 3 cancelled", result)
    assert flower.shown(deleted) == ("REVOKED", "deleted")
    assert rows.update(2.0) == 0


def test_while_redis_is_away_nothing_is_lost_and_nothing_waits(store: JobStore, flower: Flower) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"redis://127.0.0.1:{closed.getsockname()[1]}/0"
        rows = BatchRows(store.overview, SETTINGS.model_copy(update={"broker_url": nobody}))
        batch_id = submitted(store, 2)
        for _ in range(2):
            with pytest.raises(BrokerUnavailable):
                rows.update(0.0)
    render(store, batch_id, 1)
    rows._stream = flower  # type: ignore[assignment]
    rows.update(1.0)
    assert flower.shown(batch_id)[1].startswith("██████░░░░░░ 1/2 50%")


def test_a_look_at_very_many_batches_is_bounded_and_all_have_their_turn(
    store: JobStore, database: Database, rows: BatchRows, flower: Flower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_rows, "MOST", 10)
    ids = {submitted(store, 1, f"b{number}") for number in range(35)}
    store.backlog.enqueue(99)
    statements: list[str] = []

    @sa.event.listens_for(database.engine, "before_cursor_execute")
    def count(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        nonlocal statements
        statements += [statement] * (statement != "BEGIN")

    for number in range(8):
        statements = []
        assert rows.update(float(number)) <= 20
        assert len(statements) <= 10 * 7 + 10
    assert set(flower.state.tasks) == ids


def test_a_batch_is_called_what_its_submitter_likes_and_breaks_nothing(
    store: JobStore, rows: BatchRows, flower: Flower
) -> None:
    batch_id = submitted(store, 1, "a\x1b[31m\nb" + "x" * 150)
    rows.update(0.0)
    shown = flower.row(batch_id).kwargs
    assert shown.isprintable()
    assert len(shown) < 150


def test_one_failed_and_all_others_cancelled_is_a_failure(store: JobStore, rows: BatchRows, flower: Flower) -> None:
    batch_id = submitted(store, 2)
    render(store, batch_id, 1, error="no such sampler")
    store.steering.cancel(batch_id=batch_id)
    rows.update(0.0)
    assert flower.shown(batch_id)[0] == "FAILURE"
    assert store.queries.batch(batch_id).counts[JobState.CANCELLED] == 1

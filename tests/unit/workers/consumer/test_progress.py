"""The events with which a worker reports the progress of its renders to Flower, and their order."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, bootsteps
from celery.events.state import State
from kombu import Queue
from kombu.asynchronous import Hub
from kombu.transport.virtual.base import BrokerState

from workers.consumer.progress import ProgressBars
from workers.consumer.reporter import Reporter
from workers.render.request import Progress


class Renders:
    """Renders whose progress a test sets."""

    def __init__(self, **steps: int) -> None:
        self.attempt, self.steps, self.lock = 1, steps, threading.Lock()

    @contextmanager
    def __call__(self) -> Iterator[Mapping[tuple[str, int], Progress]]:
        with self.lock:
            yield {(job_id, self.attempt): Progress(done, 20, 1.0, 0.1) for job_id, done in self.steps.items()}


class Worker:
    """Celery's side of a worker: its event dispatcher, and the task state that Flower derives from the events."""

    def __init__(self, connection: Any, app: Celery) -> None:
        # By default all in-memory connections of a process share this state, and with it the queues of earlier tests.
        connection.transport.state = BrokerState()
        self.hub = Hub()
        self.event_dispatcher = app.events.Dispatcher(connection, hostname="w1@host", buffer_group=["task"])
        self.blueprint = SimpleNamespace(state=bootsteps.RUN)
        self.reporter: Any = None
        self._queue = Queue("seen", self.event_dispatcher.exchange, routing_key="#")(connection.default_channel)
        self._queue.declare()
        self.flower = State()

    def arrived(self) -> list[dict[str, Any]]:
        """Run the loop, apply the events that arrive to Flower's task state, and return them."""
        loop, found = self.hub.create_loop(), []
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline or self.reporter._due is not None:
            next(loop)
            while message := self._queue.get():
                found += message.payload
        for event in found:
            self.flower.event({**event, "local_received": event["timestamp"]})
        return found


@pytest.fixture
def worker() -> Iterator[Worker]:
    app = Celery("test", broker="memory://", set_as_current=False)
    with app.connection_for_write() as connection:
        worker = Worker(connection, app)
        Reporter(worker).start(worker)
        yield worker
        worker.hub.close()


def test_a_render_is_reported_when_it_has_progressed(worker: Worker) -> None:
    renders = Renders(**{"b-1": 3, "b-2": 0})
    bars = ProgressBars(renders, 1.0)
    bars.send(worker.reporter)
    bars.send(worker.reporter)
    renders.steps["b-1"] = 12
    bars.send(worker.reporter)
    told = [(event["uuid"], event["result"]) for event in worker.arrived()]
    assert told == [
        ("b-1", "██░░░░░░░░░░ 15% step 3/20"),
        ("b-2", "░░░░░░░░░░░░ 0% step 0/20"),
        ("b-1", "███████░░░░░ 60% step 12/20"),
    ]


def test_a_render_that_waits_for_a_slot_is_not_reported(worker: Worker) -> None:
    @contextmanager
    def waiting() -> Iterator[Mapping[tuple[str, int], Progress]]:
        yield {("b-1", 1): Progress(0, 20, None)}

    ProgressBars(waiting, 1.0).send(worker.reporter)
    assert worker.arrived() == []


def test_a_bar_never_comes_after_the_end_of_its_task(worker: Worker) -> None:
    """However the task's thread and the reporter's interleave; otherwise Flower would show the bar as the result."""
    renders = Renders(**{f"b-{number}": 1 for number in range(200)})
    bars, going = ProgressBars(renders, 1.0), threading.Event()

    def tell_on() -> None:
        while renders.steps:
            with renders.lock:
                renders.steps = {job_id: done + 1 for job_id, done in renders.steps.items()}
            bars.send(worker.reporter)
            going.set()

    telling = threading.Thread(target=tell_on)
    telling.start()
    going.wait(10)
    for number in range(200):
        with renders.lock:  # as `Worker.release` does, before the task returns
            del renders.steps[f"b-{number}"]
        worker.event_dispatcher.send("task-succeeded", uuid=f"b-{number}", result=f"'s3://farm/{number}.png'")
    telling.join(10)
    worker.arrived()
    shown = {uuid: (task.state, task.result) for uuid, task in worker.flower.tasks.items()}
    assert shown == {f"b-{number}": ("SUCCESS", f"'s3://farm/{number}.png'") for number in range(200)}


def test_a_later_attempt_shows_its_bar_although_an_earlier_one_has_failed(worker: Worker) -> None:
    worker.event_dispatcher.send("task-failed", uuid="b-1", exception="EngineFailed()")
    renders = Renders(**{"b-1": 4})
    renders.attempt = 2
    bars = ProgressBars(renders, 1.0)
    for done in (4, 8):
        renders.steps["b-1"] = done
        bars.send(worker.reporter)
    assert [event["type"] for event in worker.arrived()] == [
        "task-failed",
        "task-retried",
        "task-progress",
        "task-progress",
    ]
    task = worker.flower.tasks["b-1"]
    assert (task.state, task.result) == ("PROGRESS", "█████░░░░░░░ 40% step 8/20")


def test_while_redis_is_away_nothing_piles_up_and_afterwards_it_goes_on(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("workers.consumer.reporter.time.monotonic", lambda: clock[0])
    renders = Renders(**{"b-1": 0})
    bars = ProgressBars(renders, 1.0)
    for _ in range(1000):  # Celery's loop does not run, because it tries to connect
        clock[0] += 1
        renders.steps["b-1"] += 1
        bars.send(worker.reporter)
    assert len(worker.event_dispatcher._group_buffer["task"]) <= 3
    monkeypatch.undo()
    worker.reporter.start(worker)  # the connection is back
    renders.steps["b-1"] = 19
    bars.send(worker.reporter)
    assert worker.arrived()[-1]["result"] == "███████████░ 95% step 19/20"


def test_a_task_that_ends_after_the_workers_loop_is_still_reported(worker: Worker) -> None:
    worker.event_dispatcher.send("task-started", uuid="b-1")
    worker.blueprint.state = bootsteps.CLOSE
    worker.reporter.stop(worker)
    worker.event_dispatcher.send("task-succeeded", uuid="b-1", result="'s3://farm/1.png'")
    told = []
    while message := worker._queue.get():
        told += [event["type"] for event in message.payload]
    assert told == ["task-started", "task-succeeded"]

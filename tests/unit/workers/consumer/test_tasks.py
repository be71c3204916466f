"""A message that comes while the database is away."""

import threading
from types import SimpleNamespace

import pytest
from celery.exceptions import Ignore, Retry
from PIL import Image

from farm.errors import DatabaseUnavailable, ModelUnavailable, RenderCancelled
from farm.jobs.records import Claim
from farm.jobs.states import Outcome
from farm.specs.spec import RenderSpec
from workers.consumer import tasks
from workers.render.request import Rendered
from workers.service.observer import Held


class Away:
    """A worker whose claims fail until the database is back."""

    def __init__(self, failures: int) -> None:
        self.failures, self.asked, self.unqueued = failures, 0, []
        self.draining = threading.Event()
        self.engine = SimpleNamespace(failed=None)
        self.store = SimpleNamespace(unqueue=self.unqueued.append)

    def claim(self, job_id: str) -> None:
        self.asked += 1
        if self.asked <= self.failures:
            raise DatabaseUnavailable("away")


def test_a_claim_waits_for_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.time, "sleep", lambda seconds: None)
    worker = Away(failures=3)
    with pytest.raises(Ignore):  # somebody else has claimed it meanwhile
        tasks.render_job(worker, "b-1")
    assert worker.asked == 4


def test_a_claim_does_not_wait_for_ever_and_not_in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(tasks.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(tasks.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    worker = Away(failures=10**6)
    with pytest.raises(Ignore):
        tasks.render_job(worker, "b-1")
    assert tasks.CLAIM_SECONDS <= clock[0] < tasks.CLAIM_SECONDS + 10
    assert worker.asked < 20


def test_a_worker_that_drains_meanwhile_puts_the_job_back(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Away(failures=10**6)
    monkeypatch.setattr(tasks.time, "sleep", lambda seconds: worker.draining.set())
    with pytest.raises(Ignore):
        tasks.render_job(worker, "b-1")
    assert worker.unqueued == [["b-1"]]


def test_a_worker_whose_engine_is_broken_claims_nothing_until_it_ends() -> None:
    worker = Away(failures=0)
    worker.engine.failed = RuntimeError("the device is lost")
    with pytest.raises(Ignore):
        tasks.render_job(worker, "b-1")
    assert (worker.asked, worker.unqueued) == (0, [["b-1"]])


def test_nothing_more_of_a_job_is_written_once_its_picture_is_recorded() -> None:
    """Or else it comes after the dispatcher has looked for what is left, and a worker that dies then leaves it."""
    done: list[str] = []
    spec = RenderSpec(prompt="x", seed=1)
    claim = Claim("b-1", 1, spec, "b", "b", 1, 1, 50, None)
    image = Image.new("RGB", (8, 8))
    rendered = Rendered(image, "tiny", "0" * 64, 8, 8, 1, "none", "cpu", "float32", 0.1)
    worker = SimpleNamespace(
        has_room=lambda _: True,
        name="w",
        storage=SimpleNamespace(put=lambda *_: done.append("put"), bucket="farm"),
        observer=SimpleNamespace(end=lambda _: done.append("end"), forget=lambda _: done.append("forget")),
        succeed=lambda *_: done.append("succeed") or True,
    )
    tasks._deliver(worker, Held(claim), rendered)
    assert done == ["put", "end", "succeed", "forget"]


def test_a_job_whose_model_was_still_on_its_way_when_its_worker_stopped_is_handed_back() -> None:
    claim = Claim("b-1", 1, RenderSpec(prompt="x", seed=1), "b", "b", 1, 1, 50, None)
    handed: list[tuple[Claim, str]] = []

    def submit(_: object) -> None:
        worker.draining.set()
        raise ModelUnavailable("this worker stops, and fetches no more")

    worker = SimpleNamespace(
        has_room=lambda _: True,
        draining=threading.Event(),
        engine=SimpleNamespace(submit=submit, failed=None),
        settings=SimpleNamespace(drain_seconds=1.0),
        store=SimpleNamespace(hand_back=lambda *given, **_: handed.append(given) or True),
    )
    held = Held(claim)
    with pytest.raises(Retry, match="its worker stops"):
        tasks._render(worker, held)
    assert handed == [(claim, "its worker stops")]
    assert held.outcome is Outcome.HANDED_BACK


def test_of_a_job_that_another_attempt_has_now_flower_hears_from_that_one_only() -> None:
    def submit(_: object) -> None:
        raise RenderCancelled("its lease is lost")

    held = Held(Claim("b-1", 1, RenderSpec(prompt="x", seed=1), "b", "b", 1, 1, 50, None))
    held.lost.set()
    released: list[Held] = []
    worker = SimpleNamespace(
        has_room=lambda _: True,
        draining=threading.Event(),
        claim=lambda _: held,
        release=released.append,
        engine=SimpleNamespace(submit=submit, failed=None),
        observer=SimpleNamespace(end=lambda _: None),
        store=SimpleNamespace(),
    )
    with pytest.raises(Ignore):  # which Celery tells nobody of
        tasks.render_job(worker, "b-1")
    assert (released, held.outcome) == ([held], Outcome.LOST)

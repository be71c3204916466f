"""`farm watch` in a terminal and in a pipe."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from farm.cli import watch
from farm.cli.watch import Watcher
from farm.errors import DatabaseUnavailable
from farm.jobs.overview import Load
from farm.jobs.records import BatchStatus, JobInfo, WorkerInfo
from farm.jobs.tempo import Tempo
from tests.unit.farm.show.views import WORKER, failure, status


class Farm:
    """The part of a farm's interface that `Watcher` uses."""

    def __init__(self) -> None:
        self.statuses = [status(succeeded=1, pending=2)]
        self.wrong: list[JobInfo] = []
        self.missing: list[str] = []
        self.away = False

    def batches(self, limit: int) -> list[BatchStatus]:
        if self.away:
            raise DatabaseUnavailable("away")
        return self.statuses

    def moving(self, limit: int) -> list[BatchStatus]:
        return []

    def workers(self) -> list[WorkerInfo]:
        return [WORKER]

    def loads(self) -> dict[str, Load]:
        return {}

    def unheld(self, batch_id: str | None = None) -> list[str]:
        return self.missing

    def too_large(self, batch_id: str | None = None) -> dict[str, int]:
        return {}

    def tempo(self, batch: BatchStatus) -> Tempo:
        return Tempo()

    def failed(self, batch_id: str, limit: int) -> list[JobInfo]:
        return self.wrong[:limit]


def test_failures_are_shown_as_they_come_each_once() -> None:
    farm = Farm()
    watcher = Watcher(farm)  # type: ignore[arg-type]
    assert watcher.read().failures == ()
    for count in (1, 3, 3, 8):
        farm.statuses = [status(failed=count, pending=2)]
        farm.wrong = [failure(index) for index in range(count, 0, -1)]
        view = watcher.read()
    assert [job.index for job in view.failures] == [4, 5, 6, 7, 8]


def test_waiting_jobs_show_the_reason() -> None:
    farm = Farm()
    farm.missing = ["flux"]
    assert [line.why for line in Watcher(farm).read().batches] == ["no worker holds flux"]  # type: ignore[arg-type]


def test_in_a_pipe_a_line_is_printed_only_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    farm, file = Farm(), io.StringIO()
    looks = iter([None, None, status(succeeded=2, pending=1), None])

    def later(seconds: float) -> None:
        try:
            changed = next(looks)
        except StopIteration:
            raise KeyboardInterrupt from None
        if changed is not None:
            farm.statuses = [changed]

    monkeypatch.setattr(watch, "out", Console(file=file))
    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=later))
    with pytest.raises(KeyboardInterrupt):
        watch._print(Watcher(farm), once=False)  # type: ignore[arg-type]
    assert file.getvalue().count("sea-abcd1234") == 2
    watch._print(Watcher(farm), once=True)  # type: ignore[arg-type]
    assert file.getvalue().count("sea-abcd1234") == 3


def test_a_live_view_outlasts_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    farm, file = Farm(), io.StringIO()
    turns = iter([True, False, None])

    def later(seconds: float) -> None:
        turn = next(turns)
        if turn is None:
            raise KeyboardInterrupt
        farm.away = turn

    monkeypatch.setattr(watch, "out", Console(file=file, force_terminal=True, width=100))
    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=later))
    with pytest.raises(KeyboardInterrupt):
        watch._live(Watcher(farm))  # type: ignore[arg-type]
    assert "trying again" in file.getvalue()

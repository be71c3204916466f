"""`farm watch` in wide and narrow terminals, and where there is none."""

import io
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from farm.cli import watch
from farm.cli.watch import Looker, View, shown
from farm.errors import DatabaseUnavailable
from farm.jobs.overview import Load
from farm.jobs.records import BatchStatus, JobInfo, WorkerInfo
from farm.jobs.served_models import DeviceMemory, ServedModel
from farm.jobs.states import JobState
from farm.jobs.tempo import Tempo
from farm.specs.spec import RenderSpec

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def status(name: str = "sea", **counts: int) -> BatchStatus:
    found = {state: counts.get(state.value, 0) for state in JobState}
    return BatchStatus(f"{name}-abcd1234", name, "anna", 50, sum(found.values()), NOW, found)


def failure(index: int = 7, batch: str = "sea-abcd1234", error: str = "NaN in the latents") -> JobInfo:
    values = dict.fromkeys(("worker", "seconds_per_step", "queued_at", "started_at", "picture"))
    return JobInfo(
        id=f"{batch}-{index}", batch_id=batch, index=index, spec=RenderSpec(prompt="a"), state=JobState.FAILED,
        attempt=1, tries=1, steps_done=3, error=error, finished_at=NOW + timedelta(seconds=index), **values,  # type: ignore[arg-type]
    )  # fmt: skip


WORKER = WorkerInfo(
    name="gpu-1@node", device="cuda:0", dtype="bfloat16", slots=16, version="1",
    models=(ServedModel("sd15", loaded=True), ServedModel("flux")), memory=DeviceMemory(20 * 2**30, 80 * 2**30),
)  # fmt: skip


def drawn(view: View, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(shown(view, width))
    return file.getvalue()


def a_view(**more: Any) -> View:
    lines = [
        watch.Line(status("sea", succeeded=312, running=8, pending=680), Tempo(4.2, 164.0), ""),
        watch.Line(status("portraits", pending=20), Tempo(), "no worker holds flux"),
    ]
    return View(lines, [WORKER], {"gpu-1@node": Load(9, 0.0412)}, [failure()], **more)


def test_a_wide_terminal_shows_all_of_it() -> None:
    page = drawn(a_view(), 140)
    for words in ("312/1000", "4.2/s", "2m 44s", "8 running", "680 pending", "no worker holds flux", "cuda:0 bfloat16",
                  "20.0/80G", "9/16", "0.0412", "sd15", "NaN in the latents"):  # fmt: skip
        assert words in page
    assert "flux" not in page.replace("holds flux", "")  # served, and not loaded now
    assert "█████░░░░░░░░░░░" in page


@pytest.mark.parametrize("width", [30, 43, 44, 60, 79, 80, 99])
def test_a_narrow_terminal_shows_whole_lines_of_what_matters_most(width: int) -> None:
    page = drawn(a_view(), width)
    assert all(len(line) <= width for line in page.splitlines())
    assert len(page.splitlines()) <= 9
    assert "31%" in page or "312/1000" in page


def test_nothing_of_a_name_or_an_error_steers_the_terminal() -> None:
    view = View([watch.Line(status("\x1b]0;x\x07"), Tempo(), "")], [], {}, [failure(error="\x1b[2J\nfarm: all well")])
    page = drawn(view, 120)
    assert "\x1b" not in page
    assert "\nfarm: all well" not in page


class Farm:
    """What `Looker` asks a farm."""

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
    looker = Looker(farm)  # type: ignore[arg-type]
    assert looker.look().failures == ()
    for count in (1, 3, 3, 8):
        farm.statuses = [status(failed=count, pending=2)]
        farm.wrong = [failure(index) for index in range(count, 0, -1)]
        view = looker.look()
    assert [job.index for job in view.failures] == [4, 5, 6, 7, 8]


def test_what_waits_says_why() -> None:
    farm = Farm()
    farm.missing = ["flux"]
    assert [line.why for line in Looker(farm).look().batches] == ["no worker holds flux"]  # type: ignore[arg-type]


def test_where_it_is_piped_it_is_said_again_only_when_something_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
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
        watch._print(Looker(farm), once=False)  # type: ignore[arg-type]
    assert file.getvalue().count("sea-abcd1234") == 2
    watch._print(Looker(farm), once=True)  # type: ignore[arg-type]
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
        watch._live(Looker(farm))  # type: ignore[arg-type]
    assert "trying again" in file.getvalue()

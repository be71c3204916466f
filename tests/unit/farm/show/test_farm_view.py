"""The live view in wide and narrow terminals."""

import io
from typing import Any

import pytest
from rich.console import Console

from farm.jobs.overview import Load
from farm.jobs.tempo import Tempo
from farm.show.farm_view import BatchLine, FarmView, draw
from tests.unit.farm.show.views import WORKER, failure, status


def page_of(view: FarmView, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(draw(view, width))
    return file.getvalue()


def a_view(**more: Any) -> FarmView:
    lines = [
        BatchLine(status("sea", succeeded=312, running=8, pending=680), Tempo(4.2, 164.0), ""),
        BatchLine(status("portraits", pending=20), Tempo(), "no worker holds flux"),
    ]
    return FarmView(lines, [WORKER], {"gpu-1@node": Load(9, 0.0412)}, [failure()], **more)


def test_a_wide_terminal_shows_all_of_it() -> None:
    page = page_of(a_view(), 140)
    for words in ("312/1000", "4.2/s", "2m 44s", "8 running", "680 pending", "no worker holds flux", "cuda:0 bfloat16",
                  "20.0/80G", "9/16", "0.0412", "sd15", "NaN in the latents"):  # fmt: skip
        assert words in page
    assert "flux" not in page.replace("holds flux", "")  # served, but not loaded now
    assert "█████░░░░░░░░░░░" in page


@pytest.mark.parametrize("width", [30, 43, 44, 60, 79, 80, 99])
def test_a_narrow_terminal_shows_whole_lines_of_what_matters_most(width: int) -> None:
    page = page_of(a_view(), width)
    assert all(len(line) <= width for line in page.splitlines())
    assert len(page.splitlines()) <= 9
    assert "31%" in page or "312/1000" in page


def test_nothing_of_a_name_or_an_error_steers_the_terminal() -> None:
    view = FarmView(
        [BatchLine(status("\x1b]0;x\x07"), Tempo(), "")], [], {}, [failure(error="\x1b[2J\nfarm: all well")]
    )
    page = page_of(view, 120)
    assert "\x1b" not in page
    assert "\nfarm: all well" not in page

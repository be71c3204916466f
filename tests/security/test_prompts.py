"""Prompts, names and owners are data everywhere: in SQL, keys, terminals, HTML, pictures and logs."""

import csv
import io
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from farm.client.farm import Farm
from farm.errors import InvalidInput
from farm.jobs.records import BatchStatus, JobInfo, WorkerInfo
from farm.jobs.served_models import ServedModel
from farm.jobs.states import JobState
from farm.jobs.submissions import new_batch_id
from farm.jobs.tempo import Tempo
from farm.log import MOST_CHARS, Plain
from farm.runtime.terminal_text import printable
from farm.settings import Settings
from farm.show.contact_sheet import contact_sheet
from farm.show.farm_view import BatchLine, FarmView, draw
from farm.show.tables import batch_table, job_table
from farm.specs.object_keys import checkpoint_key, image_key, preview_key, trajectory_keys
from farm.specs.spec import MAX_PROMPT_CHARS, RenderSpec
from tests.security.conftest import HOSTILE
from workers.outputs import png
from workers.render.request import Rendered

each = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())


# --- SQL -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def farm(settings: Settings) -> Iterator[Farm]:
    with Farm(settings) as farm:
        yield farm


def test_hostile_texts_come_out_of_sql_as_they_went_in(farm: Farm, tmp_path: Path) -> None:
    texts = list(HOSTILE.values())
    rows, lines = tmp_path / "p.csv", tmp_path / "p.jsonl"
    with rows.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["prompt", "negative_prompt"], *([text, text] for text in texts)])
    lines.write_text("".join(json.dumps({"prompt": text, "negative_prompt": text}) + "\n" for text in texts))
    for given in ([{"prompt": text, "negative_prompt": text} for text in texts], rows, lines):
        batch = farm.submit(given, name=HOSTILE["SQL"], owner=HOSTILE["HTML"])
        assert [(job.spec.prompt, job.spec.negative_prompt) for job in batch] == [(text, text) for text in texts]
        assert farm.batch(HOSTILE["SQL"]).status().owner == HOSTILE["HTML"]
        assert "/" not in batch.id


def test_what_looks_like_sql_finds_no_more_than_a_name_would(farm: Farm) -> None:
    farm.submit(["a cat"], name="mine")
    for name in ("' OR '1'='1", "%", "mine' --", "_ine"):
        with pytest.raises(Exception, match="there is no batch"):
            farm.batch(name)
    assert [found.name for found in farm.batches()] == ["mine"]


@pytest.mark.parametrize("bad", ["a\0b", "a\ud800b"], ids=["NUL", "lone surrogate"])
def test_what_no_database_can_store_is_refused_with_its_place_by_every_way_in(
    farm: Farm, tmp_path: Path, bad: str
) -> None:
    text, rows, lines = tmp_path / "p.txt", tmp_path / "p.csv", tmp_path / "p.jsonl"
    raw = bad.encode("utf-8", "surrogatepass")
    text.write_bytes(b"fine\n" + raw + b"\n")
    rows.write_bytes(b"prompt\nfine\n" + raw + b"\n")
    lines.write_text('"fine"\n' + json.dumps({"prompt": bad}) + "\n")
    ways = ((text, "p.txt:2"), (rows, "p.csv:3"), (lines, "p.jsonl:2"), (["fine", bad], "spec 2"))
    for given, place in ways:
        with pytest.raises(InvalidInput, match=f"{place}: prompt: ") as caught:
            farm.submit(given)
        assert len(caught.value.problems) == 1
    for field in ("negative_prompt", "model", "scheduler"):
        with pytest.raises(InvalidInput, match=field):
            farm.submit(["fine"], **{field: bad})
    assert farm.batches() == []


# --- keys ----------------------------------------------------------------------------------------------------------


@each
def test_no_prompt_and_no_name_leads_a_key_out_of_its_batch(text: str) -> None:
    batch = new_batch_id(text)
    picture = image_key(batch, 7, 2, text)
    keys = [picture, *trajectory_keys(picture), checkpoint_key(batch, 7, 2), preview_key(batch, 7, 2)]
    for key in keys:
        folder, _, name = key.partition("/")
        assert folder == batch
        assert "/" not in name
        assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-./")
        assert not any(part.startswith(".") for part in (folder, name))


# --- terminals, logs, pictures, pages ------------------------------------------------------------------------------


def shown(*tables: object) -> str:
    console = Console(file=io.StringIO(), width=4000, force_terminal=False, highlight=False)
    console.print(*tables)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def job(text: str) -> JobInfo:
    nothing = dict.fromkeys(("queued_at", "started_at", "finished_at", "picture", "seconds_per_step"))
    return JobInfo(
        id="sea-x-1",
        batch_id="sea-x",
        index=1,
        spec=RenderSpec(prompt=text),
        state=JobState.FAILED,
        attempt=1,
        tries=1,
        worker=text,
        steps_done=0,
        error=text,
        **nothing,  # type: ignore[arg-type]
    )


@each
def test_a_table_is_text_and_no_command_whatever_it_shows(text: str) -> None:
    counts = dict.fromkeys(JobState, 0)
    batch = BatchStatus(text, text, text, 50, 1, datetime.now(UTC), counts)
    worker = WorkerInfo(text, text, text, 8, text, (ServedModel(text),))
    view = FarmView([BatchLine(batch, Tempo(), text)], [worker], {}, [job(text)])
    tables = batch_table([batch]), job_table([job(text), replace(job(text), id=text)], whole=True)
    told = shown(*tables, draw(view, 4000))
    assert all(char.isprintable() or char == "\n" for char in told)
    if text == HOSTILE["formats"]:
        assert text in told  # unchanged: neither markup nor format fields are interpreted
    assert printable(printable(text)) == printable(text)


def event(message: str, *args: object, error: BaseException | None = None) -> str:
    """A log event as the farm's processes format it."""
    info = (type(error), error, error.__traceback__) if error is not None else None
    record = logging.LogRecord("farm", logging.ERROR, __file__, 1, message, args, info)
    return Plain("%(levelname)s %(message)s").format(record)


@each
def test_an_event_in_a_log_is_one_line_whatever_it_quotes(text: str) -> None:
    line = event("refused %s", text)
    assert line.startswith("ERROR refused ")
    assert line.isprintable()


@each
def test_a_traceback_in_a_log_keeps_its_own_lines_and_no_others(text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError as error:
        lines = event("broke", error=error).split("\n")
    assert lines[0] == "ERROR broke"
    assert lines[-1].startswith("ValueError: ") or text == HOSTILE["lines"]
    assert all(line.isprintable() for line in lines)


def test_an_event_of_megabytes_is_cut() -> None:
    line = event("received %s", "x" * 5_000_000)
    assert len(line) < MOST_CHARS + 100
    assert line.endswith("… (5,000,015 characters)")


@each
def test_a_picture_carries_its_prompt_unchanged(text: str) -> None:
    spec = RenderSpec(prompt=text, negative_prompt=text, seed=1)
    rendered = Rendered(
        image=Image.new("RGB", (8, 8)),
        model="here",
        model_sha256="ab" * 32,
        width=8,
        height=8,
        steps=1,
        scheduler="x",
        device="cpu",
        dtype="float32",
        render_seconds=1.0,
    )
    image = Image.open(io.BytesIO(png.encode(spec, rendered, {"batch": text})))
    image.load()
    found = png.read(image)
    assert RenderSpec.model_validate(found["spec"]) == spec
    assert found["batch"] == text
    assert image.text["parameters"].startswith(text)


@pytest.mark.timeout(20)
def test_a_contact_sheet_takes_any_prompt_in_no_time() -> None:
    white = Image.new("RGB", (64, 64), "white")
    endless = ("x" * MAX_PROMPT_CHARS, "a" + "\u0301" * (MAX_PROMPT_CHARS - 1), "\u3000" * MAX_PROMPT_CHARS)
    assert contact_sheet([(white, text) for text in (*HOSTILE.values(), *endless)]).width > 300


def test_a_notebook_shows_a_name_as_text(farm: Farm) -> None:
    told = farm.submit(["a cat"], name=HOSTILE["HTML"])._repr_html_()
    assert "<script" not in told
    assert "<img" not in told
    assert "&lt;script&gt;" in told


def test_the_log_of_every_process_is_set_up_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from farm.log import configure

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    configure()
    logging.getLogger("farm.test").info("a\nb")
    assert stream.getvalue().endswith(" farm.test a\\nb\n")

"""The report of a batch: one self-contained file, in which prompts appear only as escaped text."""

import hashlib
import io
from base64 import b64decode
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from farm.client.report import report
from farm.errors import StorageUnavailable
from farm.jobs.overview import Totals
from farm.jobs.records import BatchStatus, JobInfo, Picture
from farm.jobs.states import JobState
from farm.specs.spec import RenderSpec

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
HOSTILE = "</figcaption><script>alert(1)</script>\" onerror='x' <img src=//evil> \x1b[31m & a heron"
TOTALS = Totals(NOW, 12.345, [("sd15", "e" * 64), ("tiny", "f" * 64)])


class Bucket:
    """A bucket of equal pictures that counts how often one was fetched."""

    def __init__(self, size: tuple[int, int] = (640, 480)) -> None:
        out = io.BytesIO()
        Image.new("RGB", size, (200, 30, 30)).save(out, "PNG")
        self.data = out.getvalue()
        self.fetched = 0
        self.away = False

    def get(self, key: str) -> bytes:
        if self.away:
            raise StorageUnavailable("away")
        self.fetched += 1
        return self.data

    def job(self, index: int, prompt: str = "a heron", state: JobState = JobState.SUCCEEDED) -> JobInfo:
        digest = hashlib.sha256(self.data).hexdigest()
        picture = Picture(f"b/{index}.png", digest, 9, 640, 480, "e" * 64, 1.5, (), 0.25)
        good = state is JobState.SUCCEEDED
        return JobInfo(
            id=f"b-{index}", batch_id="b", index=index, spec=RenderSpec(prompt=prompt, seed=7, scheduler="euler_a"),
            state=state, attempt=1, tries=0, worker=None, steps_done=20, seconds_per_step=None,
            error=None if good else f"{HOSTILE} is too much", queued_at=NOW, started_at=NOW,
            finished_at=NOW + timedelta(seconds=3), picture=picture if good else None,
        )  # fmt: skip


class Tags(HTMLParser):
    """The tags, attributes and text of a page, as a browser parses them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words += data

    def named(self, name: str) -> list[str]:
        return [str(value) for found, value in self.attributes if found == name]


def batch(name: str = "sea", **counts: int) -> BatchStatus:
    found = {state: counts.get(state.value, 0) for state in JobState}
    return BatchStatus("sea-abcd1234", name, "anna", 50, sum(found.values()), NOW, found, NOW + timedelta(minutes=3))


def written(path: Path, bucket: Bucket, jobs: int = 2, failures: int = 1, left_out: int = 0, **options: bool) -> Tags:
    good = (bucket.job(index, HOSTILE) for index in range(1, jobs + 1))
    bad = [bucket.job(99, HOSTILE, JobState.FAILED)] * failures
    status = batch(HOSTILE, succeeded=jobs + left_out, failed=failures)
    count = sum(1 for _ in report(bucket, status, TOTALS, good, bad, path, **options))  # type: ignore[arg-type]
    assert count == jobs
    return Tags(path.read_text(encoding="utf-8"))


def test_it_says_what_there_is_to_say(tmp_path: Path) -> None:
    page = written(tmp_path / "sea.html", Bucket())
    for words in (
        "sea-abcd1234",
        "anna",
        "2 succeeded, 1 failed",
        "after 3m 00s",
        "12.3 s",
        "sd15, weights SHA-256 eeee",
        "640x480, 1.5 s, 0.25 s of them on the device",
        "seed 7",
        "scheduler euler_a",
        "is too much",
        "Without a picture: 1",
    ):
        assert words in page.words


def test_prompts_names_and_errors_are_text_and_nothing_else(tmp_path: Path) -> None:
    page = written(tmp_path / "sea.html", Bucket())
    assert "script" not in page.tags
    assert page.tags.count("img") == 2
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.words.count("<script>alert(1)</script>") >= 5
    assert "\x1b" not in (tmp_path / "sea.html").read_text(encoding="utf-8")


def test_it_asks_nothing_of_the_network_and_runs_nothing(tmp_path: Path) -> None:
    page = written(tmp_path / "sea.html", Bucket())
    (policy,) = [value for value in page.named("content") if "default-src" in value]
    assert "default-src 'none'" in policy
    assert "script" not in policy
    assert all(source.startswith("data:image/webp;base64,") for source in page.named("src"))
    assert page.named("href") == []


@pytest.mark.parametrize(("full", "kind", "size"), [(False, "WEBP", (320, 240)), (True, "PNG", (640, 480))])
def test_pictures_are_small_unless_asked_for(tmp_path: Path, full: bool, kind: str, size: tuple[int, int]) -> None:
    page = written(tmp_path / "sea.html", Bucket(), full=full)
    data = b64decode(page.named("src")[0].partition(",")[2])
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == (kind, size)


def test_a_page_of_very_many_holds_few_at_a_time(tmp_path: Path) -> None:
    bucket, taken = Bucket((64, 64)), 0

    def jobs() -> Iterator[JobInfo]:
        nonlocal taken
        for taken in range(1, 401):
            yield bucket.job(taken)

    pieces = report(bucket, batch(succeeded=400), TOTALS, jobs(), [], tmp_path / "p.html")  # type: ignore[arg-type]
    for shown, _ in enumerate(pieces, 1):
        assert taken - shown <= 16


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    page = written(tmp_path / "sea.html", Bucket(), left_out=1500)
    assert "1,500 pictures are not on this page; it ends with job 2." in page.words


def test_a_page_that_breaks_off_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "sea.html"
    path.write_text("the one before")
    bucket = Bucket()
    bucket.away = True
    with pytest.raises(StorageUnavailable):
        written(path, bucket)
    assert path.read_text() == "the one before"
    assert [each.name for each in tmp_path.iterdir()] == ["sea.html"]

"""A batch as one self-contained static HTML page without scripts: pictures, specs, times, failures."""

import io
from base64 import b64encode
from collections.abc import Iterable, Iterator
from datetime import datetime
from html import escape
from pathlib import Path

from PIL import Image

from farm.client import pictures
from farm.jobs.overview import Totals
from farm.jobs.records import BatchStatus, JobInfo
from farm.jobs.states import JobState
from farm.objects.storage import Storage
from farm.runtime.atomic_files import atomic_file
from farm.runtime.parallel import parallel_map
from farm.runtime.terminal_text import printable
from farm.show.progress_text import duration
from farm.specs.spec import RenderSpec

_THUMBNAIL = 320
"""The longer side of a picture on the page, in pixels."""
_QUALITY = 82
_SECURITY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --edge: #8884; --faint: #888; --bad: #c33 }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1rem 0 }
dt { color: var(--faint) } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.2rem }
figure { margin: 0; border: 1px solid var(--edge); border-radius: .5rem; overflow: hidden; break-inside: avoid }
figure img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #8881 }
figure img.small { image-rendering: pixelated }
figcaption { padding: .6rem .8rem } figcaption p { margin: 0 0 .4rem; overflow-wrap: anywhere }
small { color: var(--faint); display: block; overflow-wrap: anywhere } .bad { color: var(--bad) }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .25rem .6rem .25rem 0; vertical-align: top; border-top: 1px solid var(--edge) }
td { overflow-wrap: anywhere } th { color: var(--faint); font-weight: normal; white-space: nowrap }
"""


def report(
    storage: Storage,
    status: BatchStatus,
    totals: Totals,
    jobs: Iterable[JobInfo],
    failures: Iterable[JobInfo],
    path: Path,
    *,
    full: bool = False,
    after: int = 0,
) -> Iterator[JobInfo]:
    """Write the page of a batch; yields each job after writing its picture, with few pictures in memory at a time.

    `jobs` have pictures, and appear in order; `failures` have none. With `full` the pictures are the rendered PNG
    files, otherwise small WebP images. The file is written atomically. Raises `StorageUnavailable`.
    """
    shown, last = 0, after
    with atomic_file(path) as file, io.TextIOWrapper(file, encoding="utf-8") as page:
        page.writelines(_head(status, totals))
        page.write("<main>\n")
        for job, source in parallel_map(lambda job: (job, _source(storage, job, full=full)), jobs):
            page.write(_figure(job, source))
            shown, last = shown + 1, job.index
            yield job
        page.write("</main>\n")
        if left_out := status.counts[JobState.SUCCEEDED] - shown:
            page.write(f"<p>{left_out:,} pictures are not on this page; it ends with job {last}.</p>\n")
        page.writelines(_failures(failures, status.counts[JobState.FAILED] + status.counts[JobState.CANCELLED]))
        page.write("</body>\n</html>\n")


def _text(value: object) -> str:
    # Prompts are untrusted text.
    return escape(printable(str(value)))


def _head(status: BatchStatus, totals: Totals) -> Iterator[str]:
    name = _text(status.name)
    yield (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_SECURITY}">\n'
        '<meta name="viewport" content="width=device-width">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>\n<dl>\n"
    )
    for term, value in _facts(status, totals):
        yield f"<dt>{_text(term)}</dt><dd>{_text(value)}</dd>\n"
    yield "</dl>\n"


def _facts(status: BatchStatus, totals: Totals) -> Iterator[tuple[str, str]]:
    counts = ", ".join(f"{count:,} {state}" for state, count in status.counts.items() if count)
    yield "batch", status.id
    yield "owner", status.owner
    yield "jobs", f"{status.total:,}: {counts}"
    yield "submitted", _moment(status.created_at)
    if totals.began_at is not None:
        yield "began", _moment(totals.began_at)
    if status.finished_at is not None:
        took = (status.finished_at - status.created_at).total_seconds()
        yield "ended", f"{_moment(status.finished_at)}, after {duration(took)}"
    if totals.device_seconds is not None:
        yield "device time", f"{totals.device_seconds:,.1f} s"
    for model, sha256 in totals.models:
        yield "model", f"{model}, weights SHA-256 {sha256}"


def _moment(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def _source(storage: Storage, job: JobInfo, *, full: bool) -> str:
    data, kind = pictures.fetch_png(storage, job), "png"
    if not full:
        image = pictures.decode(data).convert("RGB")
        image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        image.save(out, "WEBP", quality=_QUALITY, lossless=max(image.size) < _THUMBNAIL // 2)
        data, kind = out.getvalue(), "webp"
    return f"data:image/{kind};base64,{b64encode(data).decode()}"


def _figure(job: JobInfo, source: str) -> str:
    picture = pictures.picture_of(job)
    prompt = _text(job.spec.prompt)
    small = ' class="small"' if max(picture.width, picture.height) < _THUMBNAIL // 2 else ""
    times = f"{picture.render_seconds:.1f} s"
    if picture.device_seconds is not None:
        times += f", {picture.device_seconds:.2f} s of them on the device"
    if job.reused_from is not None:
        times = f"a copy of {job.reused_from}'s"
    lines = [f"{job.index}. {picture.width}x{picture.height}, {times}", _spec(job.spec), *picture.warnings]
    if job.finished_at is not None:
        lines.append(_moment(job.finished_at))
    said = "".join(f"<small>{_text(line)}</small>" for line in lines)
    return (
        f'<figure id="{_text(job.id)}"><img{small} src="{source}" alt="{prompt}" loading="lazy">'
        f"<figcaption><p>{prompt}</p>{said}</figcaption></figure>\n"
    )


def _spec(spec: RenderSpec) -> str:
    asked = spec.model_dump(exclude_none=True)
    always = ("num_inference_steps", "guidance_scale", "seed", "model")
    fields = RenderSpec.model_fields
    return ", ".join(
        f"{name} {value}"
        for name, value in asked.items()
        if name != "prompt" and (name in always or value != fields[name].default)
    )


def _failures(failures: Iterable[JobInfo], count: int) -> Iterator[str]:
    if not count:
        return
    yield f'<h2 class="bad">Without a picture: {count:,}</h2>\n<table>\n'
    shown = 0
    for shown, job in enumerate(failures, 1):  # noqa: B007 - the last number is the count
        why = job.error or str(job.state)
        yield f"<tr><th>{job.index}. {_text(job.state)}</th><td>{_text(job.spec.prompt)}<small>{_text(why)}"
        yield f"<br>{_text(_spec(job.spec))}</small></td></tr>\n"
    yield "</table>\n"
    if shown < count:
        yield f"<p>… and {count - shown:,} more.</p>\n"

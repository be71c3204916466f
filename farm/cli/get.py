"""The commands that bring things here: `get` pictures, `report` on a batch, and list `jobs`."""

import json
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from farm.cli.console import Json, find, job_json, open_farm, out, say_json
from farm.client.batch import Batch
from farm.jobs.records import JobInfo
from farm.jobs.states import JobState
from farm.runtime.atomic_files import atomic_file
from farm.show.tables import job_table

app = typer.Typer()


@app.command()
def get(
    which: Annotated[str, typer.Argument(metavar="BATCH|JOB", help="Its name or id.")],
    folder: Annotated[Path, typer.Option("--out", help="Where to put the pictures.")] = Path("out"),
    archive: Annotated[
        Path | None, typer.Option("--zip", metavar="FILE", help="Into one ZIP file instead, with the manifest.")
    ] = None,
    with_sheet: Annotated[bool, typer.Option("--sheet", help="A contact sheet beside them.")] = False,
    with_manifest: Annotated[bool, typer.Option("--manifest", help="What became of each job, manifest.jsonl.")] = False,
    as_json: Json = False,
) -> None:
    """Fetch the pictures of a batch or a job; what is there already is not fetched again."""
    with open_farm() as farm:
        found = find(farm, which)
        if archive is not None:
            if isinstance(found, JobInfo):
                raise typer.BadParameter("--zip is for a batch, not for a job")
            if with_sheet or with_manifest:
                raise typer.BadParameter("--zip has the manifest in it, and no room for a sheet")
            count = found.archive(archive, progress=not as_json)
            if as_json:
                say_json({"files": [str(archive)], "pictures": count})
            else:
                out.print(Text(f"{count} pictures and manifest.jsonl in {archive}"), soft_wrap=True)
            return
        if isinstance(found, JobInfo):
            folder.mkdir(parents=True, exist_ok=True)
            count, files = 1, [str(farm.job(found.id).download(folder))]
        else:
            count, files = fetched(found, folder, as_json=as_json)
            beside = [make(found, folder) for make, asked in ((sheet, with_sheet), (_manifest, with_manifest)) if asked]
            files += map(str, beside)
            count += len(beside)
        if as_json:
            say_json({"files": files})
        else:
            out.print(Text(f"{count} files in {folder}"), soft_wrap=True)


@app.command()
def report(
    which: Annotated[str, typer.Argument(metavar="BATCH", help="Its name or id.")],
    path: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The HTML file; by default BATCH.html.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="The PNG files themselves, not small pictures.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="So many pictures at most.")] = 1000,
    after: Annotated[int, typer.Option(min=0, help="From the job after this place on.")] = 0,
    as_json: Json = False,
) -> None:
    """Write a batch as one HTML page to send to somebody: pictures, specs, times, failures."""
    with open_farm() as farm:
        batch = farm.batch(which)
        path = path or Path(f"{batch.id}.html")
        count = batch.report(path, full=full, limit=limit, after=after, progress=not as_json)
    if as_json:
        say_json({"file": str(path), "pictures": count})
    else:
        out.print(Text(f"{count} picture{'s' * (count != 1)} in {path}"), soft_wrap=True)


@app.command()
def jobs(
    which: Annotated[str, typer.Argument(metavar="BATCH", help="Its name or id.")],
    states: Annotated[list[JobState] | None, typer.Option("--state", help="Only those in this state.")] = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="Only those with an error.")] = False,
    after: Annotated[int, typer.Option(min=0, help="From the one after this place on.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="So many at most.")] = 100,
    as_json: Json = False,
) -> None:
    """List a batch's jobs, from a place on: of a million, a page at a time."""
    with open_farm() as farm:
        batch = farm.batch(which)
        found = [
            job.info
            for job in (batch.wrong(limit) if wrong else islice(batch.jobs(after=after, states=states or ()), limit))
        ]
    if as_json:
        say_json({"jobs": [job_json(job) for job in found], "after": found[-1].index if found else after})
    elif found:
        out.print(job_table(found))
    else:
        out.print("no such jobs")


def fetched(batch: Batch, folder: Path, *, as_json: bool) -> tuple[int, list[str]]:
    """Fetch a batch's pictures into a folder; how many, and their paths if they are to be said as JSON."""
    count, files = 0, list[str]()
    for path in batch.fetch(folder, progress=not as_json):
        count += 1
        if as_json:
            files.append(str(path))
    return count, files


def sheet(batch: Batch, folder: Path) -> Path:
    """Put a batch's contact sheet into a folder; returns its path."""
    path = folder / "contact_sheet.png"
    with atomic_file(path) as file:
        batch.contact_sheet().save(file, "PNG")
    return path


def _manifest(batch: Batch, folder: Path) -> Path:
    path = folder / "manifest.jsonl"
    with atomic_file(path) as file:
        file.writelines(json.dumps(entry).encode() + b"\n" for entry in batch.manifest())
    return path

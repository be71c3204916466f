"""The commands that save files: `get` for pictures, `report` for an HTML page, `preview` for a running render."""

import json
from pathlib import Path
from typing import Annotated

import typer

from farm.cli.console import BatchName, JobId, Json, complain, find, open_farm, plural, print_json, print_line
from farm.client.batch import Batch
from farm.client.previews import Preview
from farm.errors import JobNotSucceeded
from farm.jobs.records import JobInfo
from farm.runtime.atomic_files import atomic_file

app = typer.Typer()


@app.command()
def get(
    which: Annotated[str, typer.Argument(metavar="BATCH|JOB", help="A batch by its name or id, or a job by its id.")],
    folder: Annotated[Path, typer.Option("--out", help="The folder for the files.")] = Path("out"),
    archive: Annotated[
        Path | None, typer.Option("--zip", metavar="FILE", help="Save one ZIP file with pictures and manifest instead.")
    ] = None,
    with_sheet: Annotated[bool, typer.Option("--sheet", help="Save a contact sheet, too.")] = False,
    with_manifest: Annotated[
        bool, typer.Option("--manifest", help="Save manifest.jsonl, too: a line for each job and its result.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Download the pictures of a batch or a job; pictures that are in the folder already are kept."""
    with open_farm() as farm:
        found = find(farm, which)
        if archive is not None:
            if isinstance(found, JobInfo):
                raise typer.BadParameter("--zip is for a batch, not for a job")
            if with_sheet or with_manifest:
                raise typer.BadParameter("--zip includes the manifest already, and can not include a contact sheet")
            count = found.archive(archive, progress=not as_json)
            if as_json:
                print_json({"files": [str(archive)], "pictures": count})
            else:
                print_line(f"{count} pictures and manifest.jsonl in {archive}")
            return
        if isinstance(found, JobInfo):
            folder.mkdir(parents=True, exist_ok=True)
            count, files = 1, [str(farm.job(found.id).download(folder))]
        else:
            count, files = fetch(found, folder, as_json=as_json)
            wanted = ((contact_sheet, with_sheet), (_manifest, with_manifest))
            beside = [str(save(found, folder)) for save, asked in wanted if asked]
            files += beside
            count += len(beside)
        if as_json:
            print_json({"files": files})
        else:
            print_line(f"{count} files in {folder}")


@app.command()
def report(
    which: BatchName,
    path: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The HTML file; BATCH.html by default.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Embed the PNG files themselves instead of thumbnails.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Include this many pictures at most.")] = 1000,
    after: Annotated[int, typer.Option(min=0, help="Begin after the job at this place.")] = 0,
    as_json: Json = False,
) -> None:
    """Save a batch as one HTML page: pictures, specs, times and failures."""
    with open_farm() as farm:
        batch = farm.batch(which)
        path = path or Path(f"{batch.id}.html")
        count = batch.report(path, full=full, limit=limit, after=after, progress=not as_json)
    if as_json:
        print_json({"file": str(path), "pictures": count})
    else:
        print_line(f"{count} {plural('picture', count)} in {path}")


@app.command()
def preview(
    job_id: JobId,
    vae: Annotated[
        bool, typer.Option("--vae", help="Decode it with the VAE: sharp, but takes some of the worker's time.")
    ] = False,
    path: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The PNG file; JOB.preview.png by default.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Replace the file by each new preview until the job ends.")
    ] = False,
) -> None:
    """Save a preview of a running job: its picture after the steps so far."""
    path = path or Path(f"{job_id}.preview.png")
    with open_farm() as farm:
        job = farm.job(job_id)
        if follow:
            for shown in job.previews(vae=vae):
                _save_preview(shown, path)
        try:
            _save_preview(job.preview(vae=vae), path)
        except (TimeoutError, JobNotSucceeded) as error:
            complain(str(error))
            raise typer.Exit(1) from None


def fetch(batch: Batch, folder: Path, *, as_json: bool) -> tuple[int, list[str]]:
    """Download a batch's pictures into a folder; returns their number, and their paths for the JSON output."""
    count, files = 0, list[str]()
    for path in batch.fetch(folder, progress=not as_json):
        count += 1
        if as_json:
            files.append(str(path))
    return count, files


def contact_sheet(batch: Batch, folder: Path) -> Path:
    """Save a batch's contact sheet in a folder; returns its path."""
    path = folder / "contact_sheet.png"
    with atomic_file(path) as file:
        batch.contact_sheet().save(file, "PNG")
    return path


def _manifest(batch: Batch, folder: Path) -> Path:
    path = folder / "manifest.jsonl"
    with atomic_file(path) as file:
        file.writelines(json.dumps(entry).encode() + b"\n" for entry in batch.manifest())
    return path


def _save_preview(shown: Preview, path: Path) -> None:
    # Atomic, because an image viewer may read the file at the same time.
    with atomic_file(path) as file:
        shown.image.save(file, "PNG")
    print_line(f"step {shown.step} of {shown.steps} in {path}")

"""The commands about models: those that workers hold, and `push`, `list`, `delete` for the farm's own store."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from farm.cli.console import Json, open_farm, out, print_json, print_line
from farm.objects.model_store import ModelStore
from farm.objects.storage import Storage
from farm.runtime.terminal_text import printable
from farm.runtime.transfer_progress import transfer_bar
from farm.settings import Settings
from farm.show.json_forms import stored_model_json

app = typer.Typer()
models = typer.Typer()
app.add_typer(models, name="models", help="Show the models that workers hold, or manage those in the farm's own store.")

_VERSION_CHARS = 12


@models.callback(invoke_without_command=True)
def held(context: typer.Context, as_json: Json = False) -> None:
    """Show the models that workers hold and the number of jobs that wait for each."""
    if context.invoked_subcommand is None:
        _print_held(as_json=as_json)


@models.command()
def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A checkpoint in the format of diffusers, with safetensors weights.")
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name under which workers find it: farm:NAME.")],
    as_json: Json = False,
) -> None:
    """Upload a checkpoint to the farm's object store, with hashes; workers anywhere pin it as NAME=farm:NAME.

    The model appears when it is complete. Files that were uploaded before are not sent again. Changed content becomes a
    new version, which workers use after their next start.
    """
    with _store() as (store, settings):
        pushed = store.push(
            folder, name, settings.owner, lambda what, total: transfer_bar(what, total, shown=not as_json)
        )
    manifest = pushed.manifest
    if as_json:
        print_json({**stored_model_json(manifest), "sent_bytes": pushed.sent_bytes, "new": pushed.new})
        return
    what = "is" if pushed.new else "was already"
    sizes = f"{len(manifest.files)} files, {decimal(manifest.bytes)}, {decimal(pushed.sent_bytes)} of it sent"
    print_line(f"{name} {what} version {manifest.version[:_VERSION_CHARS]}: {sizes}")
    print_line(f"workers pin it with --models {name}=farm:{name}")


@models.command("list")
def listed(as_json: Json = False) -> None:
    """List the models in the farm's object store with their versions, sizes, dates and owners."""
    with _store() as (store, _):
        found = list(store.models())
    if as_json:
        print_json([{**stored_model_json(stored.manifest), "older_versions": stored.older} for stored in found])
        return
    table = Table("model", "version", "family", "size", "pushed", "by", "older versions", box=None, header_style="bold")
    for stored in found:
        manifest = stored.manifest
        table.add_row(
            manifest.name,
            manifest.version[:_VERSION_CHARS],
            Text(printable(manifest.family)),
            decimal(manifest.bytes),
            f"{manifest.pushed_at.astimezone():%Y-%m-%d %H:%M}",
            Text(printable(manifest.pushed_by)),
            str(stored.older or ""),
        )
    out.print(table if found else "no model was pushed yet: `farm models push DIR NAME` does it")


@models.command()
def delete(
    which: Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="A model, or one of its older versions.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Delete a model with all its versions, or an older version; workers that hold it keep it until they stop."""
    with _store() as (store, _):
        manifest = store.find(which)
        what = f"{which}, {decimal(manifest.bytes)}, pushed by {printable(manifest.pushed_by)}"
        if not yes and not typer.confirm(f"delete {what} for good?", err=True):
            raise typer.Exit(1)
        store.delete(which)
    print_line(f"{which} deleted")


@contextmanager
def _store() -> Iterator[tuple[ModelStore, Settings]]:
    with open_farm() as farm:
        storage = Storage(farm.settings)
        try:
            yield ModelStore(storage), farm.settings
        finally:
            storage.close()


def _print_held(*, as_json: bool) -> None:
    with open_farm() as farm:
        held: dict[str, dict[str, Any]] = {}
        for worker in farm.workers():
            for model in worker.models if worker.alive else ():
                entry = held.setdefault(model.name, {"sha256": None, "workers": [], "waiting": 0})
                entry["sha256"] = model.sha256 or entry["sha256"]  # None until a worker has loaded it
                entry["workers"].append(worker.name)
        for model_name, waiting in farm.waiting().items():
            held.setdefault(model_name, {"sha256": None, "workers": []})["waiting"] = waiting
    if as_json:
        print_json(held)
        return
    table = Table("model", "weights", "workers", "waiting", box=None, header_style="bold")
    for model_name, entry in sorted(held.items()):
        holders = Text(", ".join(entry["workers"])) if entry["workers"] else Text("no worker", style="red")
        table.add_row(Text(model_name), (entry["sha256"] or "")[:12], holders, str(entry["waiting"]))
    out.print(table if held else "no workers and no waiting jobs")

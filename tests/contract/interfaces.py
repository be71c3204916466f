"""What other programs may rely on: names, signatures, settings, options, `--json` forms and messages, as plain data.

`interfaces.json` holds these of the previous release. This file finds them through public names alone, so that it runs
on any release: `FARM_DATABASE_URL=sqlite:///farm.db … python tests/contract/interfaces.py` prints them. It writes into
that database, that Redis and that bucket, which should be empty.
"""

import argparse
import base64
import contextlib
import dataclasses
import enum
import hashlib
import inspect
import io
import json
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import boto3
import redis
import typer
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from typer.core import TyperGroup

import farm
from farm import Farm, RenderSpec, Settings
from farm.cli import main as command_line
from workers import __main__ as worker

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("interfaces.json").read_text())
"""The interfaces of the previous release."""

_WORKER = """
    INSERT INTO workers (name, started_at, seen_at, device, dtype, slots, version, models, metrics_url)
    VALUES ('w1@host', strftime('%Y-%m-%d %H:%M:%f000'), strftime('%Y-%m-%d %H:%M:%f000'), 'cpu', 'float32', 4, '1',
            '[{"name": "tiny", "sha256": "ee", "bytes": 1, "family": "F", "samplers": "", "held": true,
               "memory": [1, 2]}]', NULL)
"""
_IMAGE_KEY = "b/00001-x.a1.png"
_SUCCEEDED = f"""
    UPDATE jobs
    SET state = 'succeeded', attempt = 1, worker = 'w1@host', steps_done = 2, image_key = '{_IMAGE_KEY}',
        started_at = '2026-01-01 00:00:01.000000', finished_at = '2026-01-01 00:00:02.000000', image_sha256 = ?,
        image_bytes = ?, width = 64, height = 64, model_sha256 = 'ee', render_seconds = 1.0, device_seconds = 0.5,
        warnings = '["w"]'
    WHERE id = ?
"""
_RUNNING = """
    UPDATE jobs
    SET state = 'running', attempt = 1, worker = 'w1@host', lease_until = '2099-01-01 00:00:00.000000',
        started_at = '2026-01-01 00:00:01.000000', steps_done = 1, seconds_per_step = 0.5
    WHERE id = ?
"""
_ATTEMPT = """
    INSERT INTO attempts (job_id, attempt, worker, started_at, ended_at, outcome, error_class, reason, steps_done,
                          device_seconds)
    VALUES (?, 1, 'w1@host', '2026-01-01 00:00:01.000000', '2026-01-01 00:00:02.000000', 'succeeded', NULL, NULL, 2,
            0.5)
"""


_INTERNAL = {"model_config", "settings_customise_sources", "row_pixels"}
"""Members of public classes for pydantic, and for the farm itself."""


def found(settings: Settings) -> dict[str, Any]:
    """Everything this file finds out about the release that it runs on, of an empty farm with an SQLite file."""
    image = _image(settings)
    with Farm(settings) as client, tempfile.TemporaryDirectory() as folder:
        batch = client.submit(
            [RenderSpec(prompt=prompt, seed=1, num_inference_steps=2) for prompt in ("one", "two", "three")],
            name="snapshot",
            owner="me",
        )
        first, second, _ = [job.id for job in batch]
        message = _message(settings)
        with _sql(settings) as sql:
            sql.execute(_WORKER)
            sql.execute(_SUCCEEDED, (*image, first))
            sql.execute(_ATTEMPT, (first,))
            sql.execute(_RUNNING, (second,))
        return {
            "python": {name: _class(getattr(farm, name)) for name in farm.__all__},
            "records": {type(record).__name__: _class(type(record)) for record in _records(client, first)},
            "settings": {name: repr(field.default) for name, field in Settings.model_fields.items()},
            "command line": {
                **dict(_commands(typer.main.get_command(command_line.__globals__["app"]))),
                "farm worker": _worker_options(),
            },
            "json": {
                "farm status": _form(_said("status")),
                "farm status BATCH": _form(_said("status", batch.id)),
                "farm status JOB": _form(_said("status", first)),
                "farm jobs": _form(_said("jobs", batch.id)),
                "farm show": _form(_said("show", first)),
                "farm models": _form(_said("models")),
                "farm doctor": _form(_said("doctor")),
                **dict(_forms_with_files(settings, image, batch.id, first, Path(folder))),
            },
            "message": message,
        }


@contextlib.contextmanager
def _sql(settings: Settings) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(settings.database_url.removeprefix("sqlite:///"))) as sql, sql:
        yield sql


def _image(settings: Settings) -> tuple[str, int]:
    """Put the picture of the jobs that succeed into the bucket; its SHA-256 and its size."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    secret = settings.s3_secret_access_key
    s3 = boto3.client(
        "s3",
        endpoint_url=settings.s3_endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key_id,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
    )
    with contextlib.closing(s3):
        s3.put_object(Bucket=settings.s3_bucket, Key=_IMAGE_KEY, Body=file.getvalue())
    return hashlib.sha256(file.getvalue()).hexdigest(), len(file.getvalue())


# --- Python --------------------------------------------------------------------------------------------------


def _records(client: Farm, job_id: str) -> Iterator[Any]:
    job = client.job(job_id)
    status = client.batches()[0]
    yield from (job.info, job.picture, client.workers()[0], status, client.tempo(status), job.attempts()[0])
    yield from (client.dry_run("a prompt"), *client.loads().values())


def _class(kind: type) -> dict[str, Any]:
    """A class's own bases, fields and public members."""
    told: dict[str, Any] = {"bases": [base.__name__ for base in kind.__mro__ if base.__module__.startswith("farm")]}
    if issubclass(kind, enum.Enum):
        return {**told, "values": {one.name: one.value for one in kind}}
    own = {name for one in kind.__mro__ if one.__module__.startswith("farm") for name in vars(one)}
    members = {name: inspect.getattr_static(kind, name) for name in own - _INTERNAL if not name.startswith("_")}
    if fields := getattr(kind, "model_fields", None):
        told["fields"] = {name: repr(field.default) for name, field in fields.items()}
    attributes = [name for name, member in members.items() if not _is_method(member)]
    if dataclasses.is_dataclass(kind):  # whether one of its attributes is stored or computed is its own affair
        attributes += [field.name for field in dataclasses.fields(kind)]
    told["attributes"] = sorted(set(attributes))
    told["methods"] = {name: _parameters(member) for name, member in members.items() if _is_method(member)}
    if kind is Farm:  # all others are made by it
        told["methods"]["__init__"] = _parameters(kind.__init__)
    return told


def _is_method(member: Any) -> bool:
    return inspect.isfunction(getattr(member, "__func__", member))


def _parameters(function: Any) -> list[list[str]]:
    """A function's parameters: name, kind, default."""
    return [
        [one.name, one.kind.description, "required" if one.default is one.empty else repr(one.default)]
        for one in inspect.signature(getattr(function, "__func__", function)).parameters.values()
        if one.name not in ("self", "cls")
    ]


# --- the command line ----------------------------------------------------------------------------------------


def _commands(group: Any, *path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each command with its arguments, as the parameters of a function, and its options by their names."""
    yield (
        " ".join(["farm", *path]),
        {
            "arguments": [
                [one.name, "positional or keyword" if one.nargs == 1 else "variadic positional", _default(one)]
                for one in group.params
                if one.param_type_name == "argument"
            ],
            "options": {
                name: {"takes": _takes(flag=one.is_flag, several=one.multiple), "default": _default(one)}
                for one in group.params
                if one.param_type_name == "option"
                for name in (*one.opts, *one.secondary_opts)
            },
        },
    )
    if isinstance(group, TyperGroup):
        for name, command in sorted(group.commands.items()):
            yield from _commands(command, *path, name)


def _worker_options() -> dict[str, Any]:
    """The options of `farm worker`, whose parser is argparse's."""
    parsers: list[argparse.ArgumentParser] = []

    def parse_args(parser: argparse.ArgumentParser) -> None:
        parsers.append(parser)
        raise SystemExit

    # Releases before `workers.__main__.parser` make it where they parse.
    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args), contextlib.suppress(SystemExit):
        worker.main()
    actions = [action for action in parsers[0]._actions if action.default != argparse.SUPPRESS]  # but --help
    return {
        "arguments": [],
        "options": {
            name: {
                "takes": _takes(flag=one.nargs == 0, several=one.nargs in ("*", "+")),
                "default": _default(one),
                "type": getattr(one.type, "__name__", "str"),
                "choices": list(one.choices) if one.choices else None,
            }
            for one in actions
            for name in one.option_strings
        },
    }


def _takes(*, flag: bool, several: bool) -> list[str]:
    return ["nothing"] if flag else ["a value", *(["several"] if several else [])]


def _default(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return repr(bool(parameter.default))  # None, too, is a flag that was not given
    return "required" if parameter.required else repr(parameter.default)


def _said(*arguments: str) -> Any:
    """What `farm ARGUMENTS --json` prints."""
    argv, sys.argv = sys.argv, ["farm", *arguments, "--json"]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            command_line()
    except SystemExit as ended:
        if ended.code not in (None, 0, 1):  # the doctor's, where something is amiss
            raise AssertionError(f"farm {' '.join(arguments)} ended with {ended.code}") from ended
    finally:
        sys.argv = argv
    return json.loads(printed.getvalue())


def _forms_with_files(
    settings: Settings, image: tuple[str, int], batch: str, job: str, folder: Path
) -> Iterator[tuple[str, Any]]:
    """The forms of the commands that read and write files or submit a batch."""
    yield "farm get BATCH", _form(_said("get", batch, "--out", str(folder)))
    yield "farm get BATCH --zip", _form(_said("get", batch, "--zip", str(folder / "batch.zip")))
    yield "farm get JOB", _form(_said("get", job, "--out", str(folder)))
    yield "farm report", _form(_said("report", batch, "--out", str(folder / "batch.html")))
    checkpoint = folder / "checkpoint"
    (checkpoint / "scheduler").mkdir(parents=True)
    (checkpoint / "scheduler" / "scheduler_config.json").write_text("{}")
    index = {"_class_name": "Pipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    yield "farm models push", _form(_said("models", "push", str(checkpoint), "mine"))
    yield "farm models list", _form(_said("models", "list"))
    yield "farm submit --dry-run", _form(_said("submit", "--dry-run", "a prompt"))
    submission = ("submit", "--key", "once", "--seed", "1", "a prompt")
    submitted = _said(*submission)
    yield "farm submit", _form(submitted)
    with _sql(settings) as sql:
        sql.execute(_SUCCEEDED, (*image, f"{submitted['batch']}-1"))
    yield "farm submit --out", _form(_said(*submission, "--out", str(folder)))  # the same batch again, which has ended


def _form(value: Any) -> Any:
    """The form of a JSON value: the keys of objects, the form of an array's first element, the types of the rest."""
    if isinstance(value, Mapping):
        return {key: _form(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_form(value[0])] if value else []
    return "null" if value is None else type(value).__name__


def metrics(text: str) -> dict[str, list[str]]:
    """The names of the farm's samples in a text for Prometheus, each with its labels."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {one.name: sorted(one.labels) for one in samples if one.name.startswith("farm_")}


# --- Redis ---------------------------------------------------------------------------------------------------


def _message(settings: Settings) -> dict[str, Any]:
    """The first message in Redis, with a name for each part that differs from one to the next."""
    with redis.Redis.from_url(settings.broker_url, decode_responses=True) as client:
        (key,) = [key for key in client.scan_iter() if client.type(key) == "list"]
        message: dict[str, Any] = json.loads(client.lindex(key, -1))
    job_id = message["headers"]["id"]
    message["body"] = json.loads(base64.b64decode(message["body"]))
    message["headers"]["origin"] = "ORIGIN"
    for name in ("delivery_tag", "reply_to"):
        if name in message["properties"]:
            message["properties"][name] = name.upper()
    told: dict[str, Any] = json.loads(json.dumps(message).replace(job_id.rpartition("-")[0], "BATCH"))
    return {"list in Redis": key, "message": told}


# --- comparing -----------------------------------------------------------------------------------------------


def changes(recorded: Any, current: Any, where: str) -> Iterator[str]:
    """What of a recorded interface is gone or different, by its path."""
    if _is_signature(recorded) and _is_signature(current):
        yield from _changed_parameters(recorded, current, where)
    elif isinstance(recorded, Mapping) and isinstance(current, Mapping):
        for name, value in recorded.items():
            if name in current:
                yield from changes(value, current[name], f"{where}.{name}")
            else:
                yield f"{where}.{name} is gone"
    elif isinstance(recorded, list) and isinstance(current, list):
        if recorded and isinstance(recorded[0], Mapping | list):
            yield from changes(recorded[0], current[0], f"{where}[]") if current else (f"{where} is empty",)
        elif gone := [value for value in recorded if value not in current]:
            yield f"{where} lacks {gone}"
    elif recorded != current:
        yield f"{where} was {recorded!r} and is {current!r}"


def _is_signature(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, list) and len(one) == 3 for one in value)


def _changed_parameters(recorded: list[list[str]], current: list[list[str]], where: str) -> Iterator[str]:
    for place, parameter in enumerate(recorded):
        if parameter not in current:
            yield f"{where} has no parameter {parameter}"
        elif parameter[1] == "positional or keyword" and current.index(parameter) != place:
            yield f"{where} has its parameter {parameter} elsewhere"
    for name, kind, default in current:
        if default == "required" and not kind.startswith("variadic") and name not in [one[0] for one in recorded]:
            yield f"{where} requires a further parameter {name}"


if __name__ == "__main__":
    json.dump(found(Settings.load()), sys.stdout, indent=1, sort_keys=True)

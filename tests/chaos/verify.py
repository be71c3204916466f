"""The invariants of a farm after a chaos run, when every process has stopped. Each check yields its breaches."""

import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import sqlalchemy as sa
from PIL import Image

from farm.errors import NotFound
from farm.jobs.database import Database
from farm.jobs.schema import AttemptRow, BatchRow, JobCountRow, JobRow
from farm.jobs.states import TRANSITIONS, JobState, Outcome
from farm.objects.model_store import PREFIX
from farm.objects.storage import Storage
from farm.specs.object_keys import manifest_key
from farm.specs.spec import RenderSpec
from tests.chaos import moves
from tests.chaos.moves import Move
from tests.chaos.orders import Journal, Order
from tests.gated import pixel
from workers.outputs import png

_ENDINGS = frozenset({Outcome.SUCCEEDED, Outcome.FAILED, Outcome.CANCELLED})
_READERS = 8

KNOWN = frozenset(
    {
        # The farm's own errors for an outage.
        "farm.errors.DatabaseUnavailable",
        "farm.errors.BrokerUnavailable",
        "farm.errors.StorageUnavailable",
        # Celery's errors for an outage of Redis.
        "redis.exceptions.ConnectionError",
        "redis.exceptions.TimeoutError",
        "kombu.exceptions.OperationalError",
    }
)
"""Exceptions whose tracebacks are allowed in a log: each reports an outage."""


@dataclass(frozen=True)
class Breach:
    """A broken invariant, and the job that shows it, if there is one."""

    message: str
    job_id: str | None = None


@dataclass(frozen=True)
class Evidence:
    """Everything the checks read: rows, moves, journal, logs and objects."""

    batches: Sequence[BatchRow]
    jobs: Mapping[str, JobRow]
    attempts: Mapping[str, Sequence[AttemptRow]]
    counts: Mapping[tuple[str, str], int]
    moves: Mapping[str, Sequence[Move]]
    entries: Sequence[Mapping[str, Any]]
    orders: Callable[[str, int], Order]
    """Returns the submission for a name and priority."""
    logs: Mapping[str, str]
    deaths: Sequence[str]
    storage: Storage
    keys: frozenset[str]

    @classmethod
    def gather(
        cls,
        database: Database,
        storage: Storage,
        journal: Journal,
        orders: Callable[[str, int], Order],
        logs: Mapping[str, str],
        deaths: Sequence[str],
    ) -> "Evidence":
        """Collect the current state."""
        attempts: dict[str, list[AttemptRow]] = defaultdict(list)
        with database.read() as session:
            batches = session.scalars(sa.select(BatchRow).order_by(BatchRow.created_at)).all()
            jobs = {job.id: job for job in session.scalars(sa.select(JobRow))}
            for row in session.scalars(sa.select(AttemptRow).order_by(AttemptRow.job_id, AttemptRow.attempt)):
                attempts[row.job_id].append(row)
            counts = {
                (batch_id, state): n
                for batch_id, state, n in session.execute(
                    sa.select(JobCountRow.batch_id, JobCountRow.state, sa.func.sum(JobCountRow.n)).group_by(
                        JobCountRow.batch_id, JobCountRow.state
                    )
                )
            }
            session.expunge_all()
        return cls(
            batches=batches,
            jobs=jobs,
            attempts=attempts,
            counts=counts,
            moves=moves.moves(database),
            entries=journal.read(),
            orders=orders,
            logs=logs,
            deaths=deaths,
            storage=storage,
            keys=frozenset(storage.keys()),
        )

    @property
    def accepted(self) -> Sequence[BatchRow]:
        """The accepted batches."""
        return [batch for batch in self.batches if batch.accepted_at is not None]

    def of(self, batch: BatchRow) -> list[JobRow]:
        """The jobs of a batch, by position."""
        return sorted((job for job in self.jobs.values() if job.batch_id == batch.id), key=lambda job: job.position)

    def names(self, what: str) -> set[str]:
        """Names of the submissions with a journal entry of this kind."""
        return {entry["name"] for entry in self.entries if entry["what"] == what}

    def story(self, job_id: str) -> str:
        """Everything known about a job: its row, moves, attempts, log lines and objects."""
        job = self.jobs.get(job_id)
        lines = [f"the story of {job_id}:"]
        if job is not None:
            shown = {attribute.key: getattr(job, attribute.key) for attribute in sa.inspect(JobRow).column_attrs}
            lines.append("  " + ", ".join(f"{name}={value}" for name, value in shown.items() if value is not None))
        lines += [f"  move     {move}" for move in self.moves.get(job_id, ())]
        lines += [
            f"  attempt  {row.attempt} {row.worker} {row.started_at} to {row.ended_at}: {row.outcome} {row.reason}"
            for row in self.attempts.get(job_id, ())
        ]
        told = re.compile(re.escape(job_id) + r"(?!\d)")
        lines += [
            f"  {name:8} {line[:300]}"
            for name, text in self.logs.items()
            for line in text.splitlines()
            if told.search(line)
        ]
        beginning = None if job is None else f"{job.batch_id}/{job.position:05d}"
        lines += [f"  object   {key}" for key in sorted(self.keys) if beginning and key.startswith(beginning)]
        return "\n".join(lines)


Check = Callable[[Evidence], Iterator[Breach]]


def every_job_has_ended(evidence: Evidence) -> Iterator[Breach]:
    """Every job of an accepted batch is in a terminal state."""
    accepted = {batch.id for batch in evidence.accepted}
    for job in evidence.jobs.values():
        if job.batch_id in accepted and not JobState(job.state).terminal:
            yield Breach(f"{job.id} has not ended, it is {job.state}", job.id)


def every_submission_is_in_once_and_whole(evidence: Evidence) -> Iterator[Breach]:
    """Every acknowledged submission is accepted exactly once; no batch is partial, none was never requested."""
    found = Counter(batch.name for batch in evidence.accepted)
    broken = evidence.names("breaks")
    for name in evidence.names("has") - set(found):
        yield Breach(f"{name} was acknowledged, and is missing")
    for name in set(found) & broken:
        yield Breach(f"{name} was interrupted halfway, and was accepted")
    for name in set(found) - evidence.names("asks") - broken:
        yield Breach(f"{name} was accepted without a request")
    for name, times in found.items():
        if times > 1:
            yield Breach(f"{name} was accepted {times} times")
    asked = {entry["name"]: entry["priority"] for entry in evidence.entries if entry["what"] == "asks"}
    for batch in evidence.accepted:
        if batch.name in asked:
            wanted = list(evidence.orders(batch.name, asked[batch.name]).specs)
            jobs = evidence.of(batch)
            if batch.total != len(wanted) or [job.position for job in jobs] != list(range(1, len(wanted) + 1)):
                yield Breach(f"{batch.name} has {len(jobs)} of {len(wanted)} jobs, and its total is {batch.total}")
            elif [RenderSpec.model_validate(job.spec) for job in jobs] != wanted:
                yield Breach(f"{batch.name} has other specs than were submitted")


def what_is_not_in_never_moves(evidence: Evidence) -> Iterator[Breach]:
    """Jobs of an interrupted submission stay pending."""
    accepted = {batch.id for batch in evidence.accepted}
    for job in evidence.jobs.values():
        if job.batch_id not in accepted and (job.state != JobState.PENDING or evidence.moves.get(job.id)):
            yield Breach(f"{job.id} is {job.state}, and its batch was never accepted", job.id)


def what_nobody_cancelled_succeeded(evidence: Evidence) -> Iterator[Breach]:
    """No fault makes a job fail: every job succeeded unless its batch was cancelled."""
    cancelled = evidence.names("cancels")
    for batch in evidence.accepted:
        for job in evidence.of(batch):
            fine = job.state == JobState.SUCCEEDED or (job.state == JobState.CANCELLED and batch.name in cancelled)
            if JobState(job.state).terminal and not fine:
                yield Breach(f"{job.id} is {job.state}: {job.error}", job.id)


def pictures_are_what_sql_says(evidence: Evidence) -> Iterator[Breach]:
    """Every succeeded job has its picture, with the right bytes, hash, size, colour for its seed, and attempt."""
    succeeded = [job for job in evidence.jobs.values() if job.state == JobState.SUCCEEDED]
    with ThreadPoolExecutor(_READERS) as pool:
        for job, wrong in zip(succeeded, pool.map(lambda job: _wrong_picture(evidence, job), succeeded), strict=True):
            if wrong:
                yield Breach(f"{job.id} succeeded, and {wrong}", job.id)


def _wrong_picture(evidence: Evidence, job: JobRow) -> str | None:
    if not job.image_key or not job.image_key.endswith(f".a{job.attempt}.png"):
        return f"its picture {job.image_key} is not of attempt {job.attempt}"
    try:
        data = evidence.storage.get(job.image_key)
    except NotFound:
        return "its picture is missing"
    if len(data) != job.image_bytes or hashlib.sha256(data).hexdigest() != job.image_sha256:
        return f"its picture of {len(data)} bytes does not match the size and hash in SQL"
    spec = RenderSpec.model_validate(job.spec)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        if image.size != (spec.width, spec.height) or image.size != (job.width, job.height):
            return f"its picture is {image.size}, not {spec.width, spec.height}"
        colours = image.getcolors()
        drawn, meant = image.getpixel((0, 0)), pixel(spec.seed)
        # The colour is a sum of one part per step, so a value near a half may round either way.
        if colours != [(image.width * image.height, drawn)] or any(
            abs(a - b) > 1 for a, b in zip(drawn, meant, strict=True)
        ):
            return f"its picture has the colours {colours}, not only {meant}"
        origin = png.read(image)
    original = job if job.reused_from is None else evidence.jobs.get(job.reused_from)
    if original is not None and (origin["job"], origin["attempt"]) != (original.id, original.attempt):
        return f"its picture's metadata names {origin['job']}, attempt {origin['attempt']}"
    return None


def nothing_else_lies_in_the_bucket(evidence: Evidence) -> Iterator[Breach]:
    """The bucket holds only pictures of succeeded jobs, manifests and pushed models: no leftovers of other attempts."""
    owned = {job.image_key for job in evidence.jobs.values() if job.state == JobState.SUCCEEDED}
    owned |= {manifest_key(batch.id) for batch in evidence.accepted}
    owners = {f"{job.batch_id}/{job.position:05d}": job.id for job in evidence.jobs.values()}
    for key in sorted(key for key in evidence.keys - owned if not key.startswith(PREFIX)):
        yield Breach(f"{key} belongs to no job or batch", owners.get(re.split(r"(?<=/\d{5})", key)[0]))


def manifests_say_how_their_batches_ended(evidence: Evidence) -> Iterator[Breach]:
    """Every ended batch has a manifest, and it agrees with SQL on each job."""
    for batch in evidence.accepted:
        if batch.ended_at is None:
            continue
        try:
            said = [json.loads(line) for line in evidence.storage.lines(manifest_key(batch.id))]
        except NotFound:
            yield Breach(f"{batch.name} has ended, and has no manifest")
            continue
        there = [(job.id, job.state, job.image_key, job.image_sha256) for job in evidence.of(batch)]
        if [(one["id"], one["state"], one.get("key"), one.get("sha256")) for one in said] != there:
            yield Breach(f"the manifest of {batch.name} does not agree with SQL")


def moves_are_legal_and_in_order(evidence: Evidence) -> Iterator[Breach]:
    """Each move starts from the state the last one led to and is in `TRANSITIONS`; terminal states are final.

    Only a claim, or the start of a copy for a pending job, adds an attempt.
    """
    for job_id, made in evidence.moves.items():
        state, attempt = JobState.PENDING, 0
        for move in made:
            if (move.was, move.attempt_was) != (state, attempt):
                yield Breach(f"{job_id}: {move} does not follow {state}, attempt {attempt}", job_id)
            elif move.was is move.now is JobState.PENDING:
                if move.attempt - move.attempt_was != 1:
                    yield Breach(f"{job_id}: {move} should add exactly one attempt", job_id)
            elif move.now not in TRANSITIONS[move.was]:
                yield Breach(f"{job_id}: {move} is not in TRANSITIONS", job_id)
            elif move.attempt - move.attempt_was != (move.now is JobState.RUNNING):
                yield Breach(f"{job_id}: {move} should add an attempt if, and only if, it is a claim", job_id)
            state, attempt = move.now, move.attempt
        if (job := evidence.jobs.get(job_id)) is not None and (job.state, job.attempt) != (state, attempt):
            yield Breach(f"{job_id} is {job.state}, attempt {job.attempt}, and its moves end elsewhere", job_id)


def every_attempt_ended_once(evidence: Evidence) -> Iterator[Breach]:
    """Every attempt has a row, and attempts do not overlap; only the last may end the job, and it matches its state."""
    for job in evidence.jobs.values():
        rows = evidence.attempts.get(job.id, ())
        if [row.attempt for row in rows] != list(range(1, job.attempt + 1)):
            yield Breach(
                f"{job.id} made {job.attempt} attempts, and has rows of {[row.attempt for row in rows]}", job.id
            )
            continue
        if any(Outcome(row.outcome) in _ENDINGS for row in rows[:-1]):
            yield Breach(f"{job.id} went on after an attempt that ended it", job.id)
        if rows and job.state == JobState.SUCCEEDED and rows[-1].outcome != Outcome.SUCCEEDED:
            yield Breach(f"{job.id} succeeded, and its last attempt says {rows[-1].outcome}", job.id)
        if job.state != JobState.SUCCEEDED and any(row.outcome == Outcome.SUCCEEDED for row in rows):
            yield Breach(f"{job.id} is {job.state}, and an attempt succeeded", job.id)
        for row, following in zip_longest(rows, rows[1:]):
            if row.started_at is None or row.started_at > row.ended_at:
                yield Breach(f"{job.id}: attempt {row.attempt} ended before it began", job.id)
            elif following is not None and following.started_at and following.started_at < row.ended_at:
                yield Breach(f"{job.id}: attempt {following.attempt} began before {row.attempt} ended", job.id)


def times_are_in_order(evidence: Evidence) -> Iterator[Breach]:
    """Times are in the order created, accepted, queued, started, finished."""
    for batch in evidence.accepted:
        for job in evidence.of(batch):
            known = {
                "created": batch.created_at,
                "accepted": batch.accepted_at,
                "queued": job.queued_at,
                # A job cancelled in the backlog may have been started by an attempt before it was last queued.
                "started": job.started_at if job.state == JobState.SUCCEEDED else None,
                "finished": job.finished_at,
            }
            times = [(name, at) for name, at in known.items() if at is not None]
            for (name, at), (following, later) in pairwise(times):
                if at > later:
                    yield Breach(f"{job.id} was {following} {later}, before it was {name} {at}", job.id)


def counts_are_what_can_be_counted(evidence: Evidence) -> Iterator[Breach]:
    """The counts that the triggers keep equal the counted rows."""
    counted = Counter((job.batch_id, job.state) for job in evidence.jobs.values())
    for which in counted.keys() | evidence.counts.keys():
        if counted[which] != evidence.counts.get(which, 0):
            yield Breach(f"{which}: job_counts says {evidence.counts.get(which, 0)}, there are {counted[which]}")


def logs_tell_each_ending_once(evidence: Evidence) -> Iterator[Breach]:
    """The end of an attempt is logged once, and so is that of a job, which may also end without an attempt."""
    told = re.compile(r"ended job_id=(\S+)(?: attempt=(\d+))? now=(\w+)")
    attempts, endings = Counter[tuple[str, str]](), Counter[str]()
    for text in evidence.logs.values():
        for job_id, attempt, state in told.findall(text):
            attempts[job_id, attempt] += bool(attempt)
            endings[job_id] += JobState(state).terminal
    for (job_id, attempt), times in attempts.items():
        if times > 1:
            yield Breach(f"{job_id}: attempt {attempt} ended {times} times", job_id)
    for job_id, times in endings.items():
        if times > 1:
            yield Breach(f"{job_id} ended {times} times", job_id)


def nobody_was_surprised(evidence: Evidence) -> Iterator[Breach]:
    """No process exited unexpectedly, and every traceback in a log reports an outage."""
    for death in evidence.deaths:
        yield Breach(death)
    for name, text in evidence.logs.items():
        for trace in tracebacks(text):
            if raised(trace) not in KNOWN:
                yield Breach(f"{name} logged an unexpected traceback:\n{trace}")


def raised(trace: str) -> str:
    """The class of the exception at the end of a traceback; its message may have several lines."""
    return next(line for line in trace.splitlines()[1:] if line[:1].strip()).partition(":")[0]


def tracebacks(text: str) -> Iterator[str]:
    """The tracebacks in a log, each with its exception line; of a chain only the last one, the exception logged."""
    trace: list[str] = []
    chained = False
    for line in [*text.splitlines(), ""]:
        if line == "Traceback (most recent call last):":
            if trace and not chained:
                yield "\n".join(trace)
            trace, chained = [line], False
        elif trace and (line.startswith((" ", "The above exception", "During handling")) or not line):
            chained = chained or line.startswith(("The above", "During handling"))
            trace.append(line)
        elif trace and re.match(r"\d{4}-\d\d-\d\d ", line):
            yield "\n".join(trace).rstrip()
            trace = []
        elif trace:
            trace.append(line)
    if trace:
        yield "\n".join(trace).rstrip()


CHECKS: tuple[Check, ...] = (
    every_job_has_ended,
    every_submission_is_in_once_and_whole,
    what_is_not_in_never_moves,
    what_nobody_cancelled_succeeded,
    pictures_are_what_sql_says,
    nothing_else_lies_in_the_bucket,
    manifests_say_how_their_batches_ended,
    moves_are_legal_and_in_order,
    every_attempt_ended_once,
    times_are_in_order,
    counts_are_what_can_be_counted,
    logs_tell_each_ending_once,
    nobody_was_surprised,
)


def breaches(evidence: Evidence, most: int = 3) -> Iterator[str]:
    """The first `most` breaches of each check; the first of each with the story of its job."""
    for check in CHECKS:
        found = list(check(evidence))
        for place, breach in enumerate(found[:most]):
            yield f"{check.__name__} [{place + 1}/{len(found)}]: {breach.message}"
            if place == 0 and breach.job_id is not None:
                yield evidence.story(breach.job_id)

"""Database triggers that record every state change of every job, independently of the farm's code."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from farm.jobs.database import Database
from farm.jobs.states import JobState

_TERMINAL = ", ".join(f"'{state.value}'" for state in JobState if state.terminal)
_RESULT = ("error", "worker", "finished_at", "started_at", "image_key", "image_sha256", "image_bytes", "tries")
"""Columns that must not change once a job has ended."""


@dataclass(frozen=True)
class Move:
    """One change of a job's state or attempt, or of the result of a job that had ended."""

    job_id: str
    was: JobState
    now: JobState
    attempt_was: int
    attempt: int
    worker: str | None
    at: str

    def __str__(self) -> str:
        return f"{self.at} {self.was} -> {self.now} attempt {self.attempt_was} -> {self.attempt} {self.worker or ''}"


def install(database: Database) -> None:
    """Create the table and triggers that record the moves."""
    with database.engine.connect() as connection:
        for statement in _SQLITE if database.engine.dialect.name == "sqlite" else _POSTGRESQL:
            connection.exec_driver_sql(statement)
        connection.commit()


def moves(database: Database) -> Mapping[str, list[Move]]:
    """The recorded moves of each job, in order."""
    found: dict[str, list[Move]] = defaultdict(list)
    columns = "job_id, was, state, attempt_was, attempt, worker, at"
    with database.engine.connect() as connection:
        for job_id, was, now, attempt_was, attempt, worker, at in connection.exec_driver_sql(
            f"SELECT {columns} FROM chaos_moves ORDER BY seq"
        ):
            found[job_id].append(Move(job_id, JobState(was), JobState(now), attempt_was, attempt, worker, str(at)))
    return found


def _changed(differs: str) -> str:
    result = " OR ".join(f"NEW.{column} {differs} OLD.{column}" for column in _RESULT)
    return f"NEW.state <> OLD.state OR NEW.attempt <> OLD.attempt OR (OLD.state IN ({_TERMINAL}) AND ({result}))"


_INSERT = "INSERT INTO chaos_moves (job_id, was, state, attempt_was, attempt, worker, at)"
_VALUES = "NEW.id, OLD.state, NEW.state, OLD.attempt, NEW.attempt, coalesce(NEW.worker, OLD.worker)"

_SQLITE = (
    "CREATE TABLE chaos_moves (seq INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT, was TEXT, state TEXT, "
    "attempt_was INTEGER, attempt INTEGER, worker TEXT, at TEXT)",
    f"CREATE TRIGGER chaos_moved AFTER UPDATE ON jobs WHEN {_changed('IS NOT')} BEGIN "
    f"{_INSERT} VALUES ({_VALUES}, strftime('%H:%M:%f', 'now')); END",
)
_POSTGRESQL = (
    "CREATE TABLE chaos_moves (seq bigserial PRIMARY KEY, job_id text, was text, state text, "
    "attempt_was integer, attempt integer, worker text, at text)",
    "CREATE FUNCTION chaos_moved() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
    f"{_INSERT} VALUES ({_VALUES}, to_char(clock_timestamp() AT TIME ZONE 'UTC', 'HH24:MI:SS.MS')); "
    "RETURN NULL; END $$",
    "CREATE TRIGGER chaos_moved AFTER UPDATE ON jobs FOR EACH ROW "
    f"WHEN ({_changed('IS DISTINCT FROM')}) EXECUTE FUNCTION chaos_moved()",
)

"""How jobs change their state: every move is one that `TRANSITIONS` allows, and one function ends jobs.

`Move` checks a move and builds its UPDATE. `finalize` executes every move that ends a job or an attempt, however it
ends, and the one that retries failed jobs.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session

from farm.jobs.conditions import in_state
from farm.jobs.database import at_commit, now
from farm.jobs.schema import AttemptRow, JobRow
from farm.jobs.states import TRANSITIONS, JobState, Outcome

log = logging.getLogger(__name__)

_Condition = sa.ColumnExpressionArgument[bool]


@dataclass(frozen=True)
class Either:
    """One of several states: that of the first case whose condition holds, else `otherwise`."""

    cases: Sequence[tuple[_Condition, JobState]]
    otherwise: JobState


class Move:
    """A change of state that `TRANSITIONS` allows, with the columns that change with it.

    `changes` maps each state that jobs leave to the one that they enter. A state that is mapped to itself is kept: the
    columns of its jobs change all the same. Raises `ValueError` for a move that is not in the table.
    """

    def __init__(self, changes: Mapping[JobState, JobState | Either], **values: Any) -> None:
        for left, target in changes.items():
            for entered in _states(target) - {left} - TRANSITIONS[left]:
                raise ValueError(f"no job moves from {left} to {entered}")
        self.leaves = frozenset(changes)
        where = in_state(next(iter(changes))) if len(changes) == 1 else JobRow.state.in_(changes)
        values["state"] = _entered(changes, lambda state: sa.literal(state.value))
        if any(state.terminal for target in changes.values() for state in (*changes, *_states(target))):
            values["finished_at"] = _entered(changes, lambda state: now() if state.terminal else sa.null())
        self.update = sa.update(JobRow).where(where).values(values)
        """The statement; its caller says which of the jobs in these states are meant."""

    @cached_property
    def of_one_attempt(self) -> sa.Update:
        """The statement for the job and attempt that are its parameters `of_job` and `of_attempt`."""
        return self.update.where(JobRow.id == sa.bindparam("of_job"), JobRow.attempt == sa.bindparam("of_attempt"))


def _states(target: JobState | Either) -> set[JobState]:
    return {target} if isinstance(target, JobState) else {target.otherwise, *(state for _, state in target.cases)}


def _entered(
    changes: Mapping[JobState, JobState | Either], value: Callable[[JobState], sa.ColumnElement[Any]]
) -> sa.ColumnElement[Any]:
    """What a job of each state gets, by the state that it enters."""

    def of(target: JobState | Either) -> sa.ColumnElement[Any]:
        if isinstance(target, JobState):
            return value(target)
        return sa.case(*((condition, value(state)) for condition, state in target.cases), else_=value(target.otherwise))

    if len(changes) == 1:
        return of(next(iter(changes.values())))
    return sa.case(*((in_state(left), of(target)) for left, target in changes.items()))


def unless_cancelled(*cases: tuple[_Condition, JobState], otherwise: JobState) -> Either:
    """The state of a job that leaves its worker without a picture: a requested cancellation comes first."""
    return Either(((JobRow.cancel_requested, JobState.CANCELLED), *cases), otherwise)


def without_worker(error: Any) -> dict[str, Any]:
    """The other columns of a job that leaves its worker without a picture."""
    return {
        "error": error,
        "worker": None,
        "lease_until": None,
        "queued_at": None,
        "steps_done": 0,
        "leftovers": True,
    }


@dataclass(frozen=True)
class Ending:
    """What is recorded of an attempt that ends; each may be an SQL expression over its job."""

    outcome: Any
    error_class: Any = None
    reason: Any = None


class Moved(NamedTuple):
    """A job after its move."""

    job_id: str
    attempt: int
    state: JobState


def finalize(
    session: Session,
    move: Move,
    *which: _Condition,
    ending: Ending | None = None,
    each: Sequence[Mapping[str, Any]] = (),
    note: str = "",
) -> list[Moved]:
    """End jobs or their attempts, or retry failed jobs; returns the jobs that were moved or marked.

    With `ending`, the attempts of the jobs end with the move, and their rows are written. With `each`, locked jobs
    succeed, and it holds the move's parameters for each of them, `of_job` and `of_attempt` included. Every attempt and
    job that ends is logged once, when the transaction commits.
    """
    connection = session.connection()
    if each:
        connection.execute(move.of_one_attempt, each)
        connection.execute(_SUCCEEDED_ATTEMPTS, {"job_ids": [one["of_job"] for one in each]})
        moved = [Moved(one["of_job"], one["of_attempt"], JobState.SUCCEEDED) for one in each]
    else:
        if ending is not None and JobState.RUNNING in move.leaves:
            # Before the move, which clears what the rows are made of. Locked, no job changes in between.
            which = (JobRow.id.in_(_end_attempts(connection, ending, *which)),)
        rows = connection.execute(move.update.where(*which).returning(JobRow.id, JobRow.attempt, JobRow.state)).all()
        moved = [Moved(job_id, attempt, JobState(state)) for job_id, attempt, state in rows]
        if ending is not None and JobState.RUNNING not in move.leaves:
            _complete_attempts(connection, ending, moved)
    _log_at_commit(session, moved, attempts=bool(each) or ending is not None, note=note)
    return moved


def _attempt_rows(ending: Ending, ended_at: Any) -> sa.Select[Any]:
    """The rows of the current attempts of jobs, to be inserted."""
    values = {
        "job_id": JobRow.id,
        "attempt": JobRow.attempt,
        "worker": JobRow.worker,
        "started_at": JobRow.started_at,
        "ended_at": ended_at,
        "outcome": sa.cast(ending.outcome, AttemptRow.outcome.type),
        "error_class": sa.cast(ending.error_class, AttemptRow.error_class.type),
        "reason": sa.cast(ending.reason, AttemptRow.reason.type),
        "steps_done": JobRow.steps_done,
        "device_seconds": JobRow.device_seconds,
    }
    return sa.select(*(values[column] for column in _ATTEMPT_COLUMNS))


def _end_attempts(connection: sa.Connection, ending: Ending, *which: _Condition) -> Sequence[str]:
    """Record the end of running jobs' attempts, and lock the jobs until the transaction ends; returns their ids."""
    ended = _attempt_rows(ending, now()).where(in_state(JobState.RUNNING), *which).order_by(JobRow.id)
    written = sa.insert(AttemptRow).from_select(_ATTEMPT_COLUMNS, ended.with_for_update())
    return connection.scalars(written.returning(AttemptRow.job_id)).all()


def _complete_attempts(connection: sa.Connection, ending: Ending, moved: Sequence[Moved]) -> None:
    """Record the end of attempts that no worker made, whose rows were written when they began."""
    for job in moved:
        connection.execute(
            sa.update(AttemptRow)
            .where(AttemptRow.job_id == job.job_id, AttemptRow.attempt == job.attempt)
            .values(ended_at=now(), outcome=ending.outcome, error_class=ending.error_class, reason=ending.reason)
        )


def _log_at_commit(session: Session, moved: Sequence[Moved], *, attempts: bool, note: str) -> None:
    """Log the attempts that end with a move. Jobs that end without one can be a million at once: for debugging only."""

    def log_endings() -> None:
        for job in moved:
            if attempts:
                log.info("ended job_id=%s attempt=%d now=%s%s", job.job_id, job.attempt, job.state, note)
            elif job.state.terminal:
                log.debug("ended job_id=%s now=%s%s", job.job_id, job.state, note)

    if moved:
        at_commit(session, log_endings)


_ATTEMPT_COLUMNS = [column.name for column in AttemptRow.__table__.columns]
_SUCCEEDED_ATTEMPTS = sa.insert(AttemptRow).from_select(
    _ATTEMPT_COLUMNS,
    _attempt_rows(Ending(Outcome.SUCCEEDED.value), JobRow.finished_at).where(
        JobRow.id.in_(sa.bindparam("job_ids", expanding=True))
    ),
)

UNQUEUE = Move({JobState.QUEUED: JobState.PENDING}, queued_at=None)
"""Puts queued jobs back into the backlog."""

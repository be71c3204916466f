"""Transitions of jobs: only those in the table, and only from the state that they leave."""

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from farm.jobs.schema import JobRow
from farm.jobs.states import TRANSITIONS, JobState
from farm.jobs.transitions import Either, Move


@pytest.mark.parametrize("left", JobState)
@pytest.mark.parametrize("entered", JobState)
def test_a_move_is_made_only_if_the_table_allows_it(left: JobState, entered: JobState) -> None:
    if entered is left or entered in TRANSITIONS[left]:
        Move({left: entered})
        Move({left: Either(((JobRow.paused, entered),), left)})
    else:
        with pytest.raises(ValueError, match=f"no job moves from {left} to {entered}"):
            Move({left: entered})
        with pytest.raises(ValueError, match="no job moves"):
            Move({left: Either(((JobRow.paused, entered),), left)})


@pytest.mark.parametrize("dialect", [sqlite.dialect(), postgresql.dialect()], ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("left", JobState)
def test_a_move_changes_only_jobs_in_the_state_that_it_leaves(left: JobState, dialect: sa.Dialect) -> None:
    for entered in TRANSITIONS[left]:
        statement = str(Move({left: entered}).update.compile(dialect=dialect))
        assert statement.endswith(f"WHERE jobs.state = '{left.value}'")
        assert ("finished_at=" in statement) == (left.terminal or entered.terminal)

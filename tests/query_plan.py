"""Query plans."""

import sqlalchemy as sa

from farm.jobs.database import Database


def plan(database: Database, query: sa.Select[object]) -> str:
    """Return the plan of a query, as `EXPLAIN` prints it."""
    with database.read() as session:
        compiled = query.compile(database.engine, compile_kwargs={"literal_binds": True})
        how = "EXPLAIN QUERY PLAN" if database.engine.dialect.name == "sqlite" else "EXPLAIN"
        return "\n".join(str(tuple(row)) for row in session.execute(sa.text(f"{how} {compiled}".replace(":", "\\:"))))

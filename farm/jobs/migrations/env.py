"""How Alembic runs the farm's migrations: over the connection that `Database.migrate` hands it."""

from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa
from alembic import context
from alembic.runtime.migration import MigrationContext, MigrationInfo
from alembic.script import Script

from farm.jobs.schema import Base, ReleaseRow
from farm.version import __version__


def note_release(
    ctx: MigrationContext, step: MigrationInfo, heads: Collection[Any], run_args: Mapping[str, Any]
) -> None:
    """Write down, in the migration's own transaction, which version brought it and which programs it serves."""
    script, connection = step.up_revision, ctx.connection
    serves_from = getattr(script.module, "serves_from", None) if isinstance(script, Script) else None
    if script is None or connection is None or serves_from is None or not step.is_upgrade:
        return  # the first four came before this was written down
    connection.execute(
        sa.insert(ReleaseRow).values(revision=script.revision, version=__version__, serves_from=serves_from)
    )


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite can't alter most of a table in place
    transaction_per_migration=True,
    on_version_apply=note_release,
)
with context.begin_transaction():
    context.run_migrations()

"""How Alembic runs the farm's migrations: over the connection that `Database.migrate` hands it."""

from alembic import context

from farm.schema import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite can't alter most of a table in place
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()

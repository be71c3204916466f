"""The schema's history, run by Alembic through `Database.migrate`."""

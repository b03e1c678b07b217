"""What all tests share: one embedded PostgreSQL a session, a fresh database a test."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg2
import pytest
from psycopg2.extensions import make_dsn

from services import processes
from services.mlflow_server import MlflowServer
from services.postgres import Postgres, address
from settings import PROJECT_ROOT

if TYPE_CHECKING:
    from tests.served import Api, Registered

SHARED_DATA = PROJECT_ROOT.parent / "shared" / "data" / "diabetes_130us.zip"
_PASSWORD = "only-for-tests"
_LANE = 40 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
"""Added to ports: of two processes of tests, both would find the same one free at the same time."""
MLFLOW_PASSWORD = "only for mlflow's tests: 100 %/@?"

# Read when mlflow is imported, in this process or in one that a test starts.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


@dataclass(frozen=True, slots=True)
class Database:
    """An empty database on the session's server."""

    port: int
    name: str

    @property
    def dsn(self) -> str:
        return str(
            make_dsn(
                host="127.0.0.1",
                port=self.port,
                user="postgres",
                password=_PASSWORD,
                dbname=self.name,
            )
        )

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which our packages and dbt use this database."""
        return {
            "DIABETES_DB_HOST": "127.0.0.1",
            "DIABETES_DB_PORT": str(self.port),
            "DIABETES_DB_USER": "postgres",
            "DIABETES_DB_PASSWORD": _PASSWORD,
            "DIABETES_DB_NAME": self.name,
        }

    def rows(self, query: str, *arguments: object) -> list[tuple[object, ...]]:
        """Run one query in a transaction of its own and return its rows."""
        with closing(psycopg2.connect(self.dsn)) as connection, connection:
            cursor = connection.cursor()
            cursor.execute(query, arguments or None)
            return cursor.fetchall() if cursor.description else []


@pytest.fixture(scope="session")
def reachable_tmp() -> Iterator[Path]:
    """A folder that the unprivileged user of PostgreSQL can enter (pytest's own it can't)."""
    with tempfile.TemporaryDirectory(prefix="diabetes-tests-") as folder:
        path = Path(folder)
        path.chmod(0o755)
        yield path


@pytest.fixture(scope="session")
def server_port(reachable_tmp: Path) -> Iterator[int]:
    """Port of an embedded PostgreSQL that lives as long as the session."""
    server = Postgres(reachable_tmp / "server")
    port = server.start(56000 + _LANE, _PASSWORD)
    yield port
    server.stop()


@pytest.fixture
def database(server_port: int, request: pytest.FixtureRequest) -> Iterator[Database]:
    """A fresh, empty database, dropped after the test."""
    with closing(_maintenance(server_port)) as connection:
        cursor = connection.cursor()
        cursor.execute("select count(*) from pg_database")
        (number,) = cursor.fetchone() or (0,)
        name = f"test_{os.getpid()}_{number}"
        cursor.execute(f"create database {name}")
        yield Database(server_port, name)
        cursor.execute(f"drop database {name} with (force)")


@pytest.fixture(scope="session")
def mlflow_server(server_port: int, reachable_tmp: Path) -> Iterator[str]:
    """URI of an MLflow server that lives as long as the session."""
    owner = {"mlflow": MLFLOW_PASSWORD}
    Postgres(reachable_tmp / "server").ensure_databases(server_port, _PASSWORD, owner)
    state = reachable_tmp / "mlflow-server"
    database = address(server_port, "mlflow", MLFLOW_PASSWORD)
    server = MlflowServer(state, f"postgresql+psycopg2://{database}")
    try:
        uri = server.start(56500 + _LANE)
        server.wait_until_ready()
        yield uri
    finally:
        processes.stop(state)


@pytest.fixture(scope="session")
def registered(
    server_port: int, mlflow_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Registered]:
    """A champion and another version, in the session's MLflow."""
    from tests.served import register

    with closing(_maintenance(server_port)) as connection:
        name = f"served_{os.getpid()}"
        connection.cursor().execute(f"create database {name}")
        with warnings.catch_warnings():
            # mlflow warns of its own use of pandas and of type hints in itself.
            warnings.simplefilter("ignore")
            folder = tmp_path_factory.mktemp("registered")
            made = register(Database(server_port, name), mlflow_server, folder)
        yield made
        connection.cursor().execute(f"drop database {name} with (force)")


@pytest.fixture(scope="session")
def api(registered: Registered, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The prediction API on the champion, for tests that leave it as it is."""
    from tests.served import running_api

    with running_api(tmp_path_factory.mktemp("api"), registered) as running:
        yield running


def _maintenance(port: int) -> psycopg2.extensions.connection:
    connection = psycopg2.connect(Database(port, "postgres").dsn)
    connection.autocommit = True
    return connection


@pytest.fixture(scope="session")
def real_zip() -> Path:
    """The publisher's zip, where this machine has it."""
    for candidate in (os.environ.get("DIABETES_SOURCE", ""), str(SHARED_DATA)):
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    pytest.skip("the real file is not here: set DIABETES_SOURCE to diabetic_data.csv or its zip")

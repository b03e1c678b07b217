"""What all tests share: the lanes, and the servers that live as long as the session.

A test's lane is its folder. What each lane needs, and what it takes: docs/testing.md.
"""

from __future__ import annotations

import os
import signal
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg2
import pytest

from services import processes
from services.mlflow_server import MlflowServer
from services.postgres import Postgres, address
from settings import PROJECT_ROOT
from tests.warehouse import PASSWORD, Database, Dbt, ingest, ingest_synthetic, new_database
from training import features

if TYPE_CHECKING:
    from tests.served import Api, Registered

pytest_plugins = ["tests.timings", "tests.deploy.desk", "tests.deploy.storage", "tests.deploy.trio"]

LANES = {
    "unit": "nothing but this process",
    "dbt": "PostgreSQL and dbt",
    "dags": "Airflow's DagBag",
    "manifests": "files, and the programs that check them",
    "deploy": "the deploy scripts on a recorded cluster, its jobs, MLflow with logins",
    "integration": "PostgreSQL, MLflow, our services, a browser",
    "e2e": "the whole platform, brought up once",
}
"""Folders of tests whose tests are the quick lane, `make test`, and what they need."""

LONG_LANES = {
    "faults": "services that are killed, stopped or flooded",
    "load": "load generators and benchmarks",
    "cluster": "deploy scripts broken off; the manifests' servers as processes; a Docker engine",
}
"""The same of `make test-all`, which `make test` leaves out."""

SHARED_DATA = PROJECT_ROOT.parent / "shared" / "data" / "diabetes_130us.zip"
_LANE = 40 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
"""Added to ports: of two processes of tests, both would find the same one free at the same time."""
MLFLOW_PASSWORD = "only for mlflow's tests: 100 %/@?"

_VICTIMS = {"own_mlflow", "own_postgres", "own_server"}
"""Servers that a test kills: it is of the lane faults, whatever its folder."""

_GROUPS = ({"mlflow_server", "real"}, {"laid_out"}, {"trio"})
"""Dear fixtures, the dearest first: tests that use one of a group run in the same process, and
before others, so that each is set up once and nobody waits for it at the end."""

# Read when mlflow is imported, in this process or in one that a test starts.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# A thread of LightGBM that waits for work must not keep a core from those that have some.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_configure(config: pytest.Config) -> None:
    """Make the lanes known as markers."""
    # A shell lets what it starts in the background ignore Ctrl-C, and programs inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for lane, needs in {**LANES, **LONG_LANES}.items():
        config.addinivalue_line("markers", f"{lane}: needs {needs}")
    config.addinivalue_line("markers", "long: of a lane that `make test` leaves out")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its lane, and put those that share a server together."""
    for item in items:
        lane = _lane(item)
        item.add_marker(lane)
        if lane in LONG_LANES:
            item.add_marker("long")
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=_place)


def _lane(item: pytest.Item) -> str:
    if not _VICTIMS.isdisjoint(_fixtures(item)):
        return "faults"
    return item.path.relative_to(PROJECT_ROOT / "tests").parts[0]


def _fixtures(item: pytest.Item) -> Sequence[str]:
    return getattr(item, "fixturenames", ())


def _place(item: pytest.Item) -> int:
    shared = (not group.isdisjoint(_fixtures(item)) for group in _GROUPS)
    return next((place for place, used in enumerate(shared) if used), len(_GROUPS))


def _group(item: pytest.Item) -> str:
    place = _place(item)
    if place < len(_GROUPS):
        return f"shared-{place}"
    return str(item.path.relative_to(PROJECT_ROOT / "tests").with_suffix(""))


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
    port = server.start(56000 + _LANE, PASSWORD)
    # Nobody needs these data after a crash of the machine.
    with closing(psycopg2.connect(Database(port, "postgres").dsn)) as connection:
        connection.autocommit = True
        for setting in ("fsync", "full_page_writes", "synchronous_commit"):
            connection.cursor().execute(f"alter system set {setting} = off")
        connection.cursor().execute("select pg_reload_conf()")
    yield port
    server.stop()


@pytest.fixture
def database(server_port: int) -> Iterator[Database]:
    """A fresh, empty database, dropped after the test."""
    with new_database(server_port, f"test_{os.urandom(6).hex()}") as made:
        yield made


@pytest.fixture(scope="session")
def built(server_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """12,000 synthetic encounters through dbt, in batches of 3,000; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("built")
    with new_database(server_port, f"built_{os.getpid()}") as made:
        ingest_synthetic(made, folder, 12_000)
        Dbt(made, folder / "target").build("--exclude-resource-type", "test", batch_size=3_000)
        yield made


@pytest.fixture(scope="session")
def definition(built: Database) -> dict[str, Any]:
    """The feature SQL that dbt compiles for `built`; for a copy of it, it is the same."""
    return features.read(built.dsn)


@pytest.fixture(scope="session")
def real(
    server_port: int, real_zip: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Database]:
    """The real file, loaded and built; to be read or copied, not changed."""
    with new_database(server_port, f"real_{os.getpid()}") as made:
        ingest(made, real_zip)
        Dbt(made, tmp_path_factory.mktemp("dbt")).build("--exclude-resource-type", "test")
        yield made


@pytest.fixture(scope="session")
def mlflow_server(server_port: int, reachable_tmp: Path) -> Iterator[str]:
    """URI of an MLflow server that lives as long as the session."""
    owner = {"mlflow": MLFLOW_PASSWORD}
    Postgres(reachable_tmp / "server").ensure_databases(server_port, PASSWORD, owner)
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
    built: Database,
    definition: dict[str, Any],
    mlflow_server: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Registered]:
    """A champion and another version, in the session's MLflow."""
    from tests.served import register

    with (
        new_database(built.port, f"served_{os.getpid()}", template=built.name) as database,
        warnings.catch_warnings(),
    ):
        # mlflow warns of its own use of pandas and of type hints in itself.
        warnings.simplefilter("ignore")
        folder = tmp_path_factory.mktemp("registered")
        yield register(database, definition, mlflow_server, folder)


@pytest.fixture(scope="session")
def api(registered: Registered, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The prediction API on the champion, for tests that leave it as it is."""
    from tests.served import running_api

    with running_api(tmp_path_factory.mktemp("api"), registered) as running:
        yield running


@pytest.fixture(scope="session")
def real_zip() -> Path:
    """The publisher's zip, where this machine has it."""
    for candidate in (os.environ.get("DIABETES_SOURCE", ""), str(SHARED_DATA)):
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    pytest.skip("the real file is not here: set DIABETES_SOURCE to diabetic_data.csv or its zip")

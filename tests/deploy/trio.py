"""PostgreSQL, SeaweedFS and MLflow as real processes, with the flags and the environment of the
manifests, set up by the commands of the manifests' Jobs.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psycopg2
import pytest
import requests

from services.postgres import Postgres, _as_unprivileged, _own
from services.processes import free_port
from tests.deploy.pods import PYTHON_PROGRAMS, Cluster
from tests.deploy.storage import WEED, process, wait_for, weed_ports
from tests.manifests.manifests import find, pod, render

OVERLAY = "overlays/seaweedfs"
DATABASES = ("mlflow", "diabetes", "airflow")
USERS = ("serving", "pipeline", "metrics")
API = "api/2.0/mlflow"


def password() -> str:
    return secrets.token_hex(16)


def made_secrets() -> dict[str, dict[str, str]]:
    """What scripts/deploy.sh generates, as far as these pods read it."""
    postgres = {f"{name}-password": password() for name in ("superuser", *DATABASES)}
    uri = f"postgresql+psycopg2://mlflow:{postgres['mlflow-password']}@postgres:5432/mlflow"
    login = textwrap.dedent(f"""\
        [mlflow]
        default_permission = READ
        database_uri = {uri}
        admin_username = admin
        authorization_function = mlflow.server.auth:authenticate_request_basic_auth
        auth_cache_ttl_seconds = 60
        """)
    metrics = password()
    return {
        "postgres-credentials": postgres,
        "monitoring-credentials": {
            f"{name}-password": password() for name in ("monitoring", "reader")
        },
        "airflow-monitoring": {
            "url": "http://airflow-api-server:8080",
            "user": "metrics",
            "password": metrics,
            "passwords.json": json.dumps({"metrics": metrics}),
        },
        "storage-credentials": {"access-key": "adminuser", "secret-key": password()},
        "mlflow-credentials": {
            "admin-password": password(),
            "flask-secret-key": password(),
            "backend-store-uri": uri,
            "basic_auth.ini": login,
            **{f"{name}-password": password() for name in USERS},
        },
    }


@dataclass(slots=True, repr=False)
class Trio:
    """The three servers.

    Attributes:
        cluster: what they are made of.
        postgres_port, url, storage_url: where they listen.
        log: of MLflow.
        mlflow: its process.
    """

    cluster: Cluster
    postgres_port: int
    url: str
    storage_url: str
    log: Path
    mlflow: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        return self.url.removeprefix("http://")

    def login(self, user: str) -> tuple[str, str]:
        return user, self.cluster.secrets["mlflow-credentials"][f"{user}-password"]

    def call(
        self, method: str, path: str, user: str = "pipeline", **arguments: Any
    ) -> requests.Response:
        return requests.request(
            method, f"{self.url}/{path}", auth=self.login(user), timeout=60, **arguments
        )

    def storage(self) -> Any:
        keys = self.cluster.secrets["storage-credentials"]
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.storage_url,
            aws_access_key_id=keys["access-key"],
            aws_secret_access_key=keys["secret-key"],
            region_name="us-east-1",
        )

    def job(self, name: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.cluster.process("Job", name, **variables).run()

    def python(self, user: str, script: str, **variables: str) -> str:
        """What a client of MLflow prints, with the environment that the manifests give to it."""
        name, its_password = self.login(user)
        client = find(self.cluster.objects, "ConfigMap", "mlflow-client")["data"]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.cluster.folder),
                **client,
                "MLFLOW_TRACKING_URI": self.url,
                "MLFLOW_TRACKING_USERNAME": name,
                "MLFLOW_TRACKING_PASSWORD": its_password,
                **variables,
            },
            cwd=self.cluster.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def connect(self, database: str, user: str = "") -> psycopg2.extensions.connection:
        """A connection of the database's owner, or of one of the roles that only look."""
        known = self.cluster.secrets
        passwords = {**known["postgres-credentials"], **known["monitoring-credentials"]}
        connection = psycopg2.connect(
            host="127.0.0.1",
            port=self.postgres_port,
            user=user or database,
            dbname=database,
            password=passwords[f"{user or database}-password"],
        )
        connection.autocommit = True
        return connection

    def rows(self, database: str, query: str) -> list[tuple[Any, ...]]:
        with closing(self.connect(database)) as connection:
            cursor = connection.cursor()
            cursor.execute(query)
            return cursor.fetchall() if cursor.description else []

    def content(self, database: str) -> dict[str, tuple[int, str]]:
        """Number of rows and checksum of each table."""
        tables = self.rows(
            database,
            "select format('%I.%I', schemaname, tablename) from pg_tables "
            "where schemaname not in ('pg_catalog', 'information_schema') order by 1",
        )
        found = {}
        for (table,) in tables:
            rows = self.rows(database, f"select t::text from {table} t order by 1")
            digest = hashlib.sha256("\n".join(row for (row,) in rows).encode()).hexdigest()
            found[table] = (len(rows), digest)
        return found

    def start_mlflow(self, **variables: str) -> None:
        server = self.cluster.process("Deployment", "mlflow", **variables)
        with self.log.open("ab") as output:
            self.mlflow = subprocess.Popen(
                server.command,
                env=server.environment,
                cwd=self.cluster.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_for(self.mlflow, lambda: requests.get(f"{self.url}/health", timeout=5).ok, self.log)

    def stop_mlflow(self) -> float:
        """SIGTERM; how long it took."""
        began = time.monotonic()
        self.mlflow.terminate()
        self.mlflow.wait(self.grace("Deployment", "mlflow"))
        return time.monotonic() - began

    def grace(self, kind: str, name: str) -> int:
        spec = pod(find(self.cluster.objects, kind, name))
        assert spec is not None
        return int(spec["terminationGracePeriodSeconds"])


@contextmanager
def running_postgres(cluster: Cluster, binaries: Path, port: int) -> Iterator[None]:
    """The StatefulSet postgres, as its image starts it: initdb at the first start, then the server.

    PostgreSQL refuses root, so it runs as nobody here.
    """
    server = cluster.process("StatefulSet", "postgres")
    log = cluster.folder / "postgres.log"
    log.touch()
    for path in (cluster.folder / "postgres").rglob("*"):
        _own(path)
    data = Path(server.environment["PGDATA"])
    for folder in (data.parent, data):
        folder.mkdir(parents=True, exist_ok=True)
        _own(folder)
    initialise = [
        str(binaries / "initdb"),
        f"--pgdata={data}",
        "--username=postgres",
        f"--pwfile={server.environment['POSTGRES_PASSWORD_FILE']}",
        *server.environment["POSTGRES_INITDB_ARGS"].split(),
    ]
    subprocess.run(
        [*_as_unprivileged(), *initialise], cwd="/", stdout=subprocess.DEVNULL, check=True
    )
    command = [*_as_unprivileged(), str(binaries / server.command[0]), *server.command[1:]]
    with process(command, server.environment, log) as running:
        try:
            ready = [str(binaries / "pg_isready"), "--quiet", "--host=127.0.0.1", f"--port={port}"]
            wait_for(running, lambda: not subprocess.run(ready, check=False).returncode, log)
            yield
        finally:
            running.send_signal(signal.SIGINT)  # the image's STOPSIGNAL
            running.wait(60)


@pytest.fixture(scope="session")
def trio(reachable_tmp: Path) -> Iterator[Trio]:
    """The three, set up by the Jobs, with MLflow's users."""
    folder = reachable_tmp / "trio"
    folder.mkdir()
    binaries = Postgres(folder)._binaries
    # MLflow binds its port late: another run of these tests must not choose the same.
    postgres, mlflow = (free_port(start + os.getpid() % 500) for start in (31500, 31000))
    ports = weed_ports()
    s3 = ports["s3.port"]
    cluster = Cluster(
        render(OVERLAY),
        made_secrets(),
        folder,
        programs=(PYTHON_PROGRAMS, binaries),
        fields={"status.podIP": "127.0.0.1"},
        # All that differs from the cluster, beside folders for mounts.
        table={
            r"@postgres:5432\b": f"@127.0.0.1:{postgres}",
            r"//minio:9000\b": f"//127.0.0.1:{s3}",
            r"//mlflow:5000\b": f"//127.0.0.1:{mlflow}",
            r":5000\b": f":{mlflow}",
            r"^--port=5000$": f"--port={mlflow}",
            r"^--host=0\.0\.0\.0$": "--host=127.0.0.1",
            r"^-ip(\.bind)?=.*": r"-ip\1=127.0.0.1",
            r"^-s3\.port=9000$": f"-s3.port={s3}",
            r"^-admin\.port=9001$": f"-admin.port={ports['admin.port']}",
            r"^-metricsPort=9327$": f"-metricsPort={free_port(32000 + os.getpid() % 500)}",
        },
        appended={
            "postgres": [
                *("-c", "listen_addresses=127.0.0.1"),
                *("-c", "unix_socket_directories="),
                *("-c", f"port={postgres}"),
            ],
            "minio": [
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                *(f"-{name}={port}" for name, port in ports.items()),
            ],
        },
    )
    platform = find(cluster.objects, "ConfigMap", "platform")["data"]
    platform |= {"POSTGRES_HOST": "127.0.0.1", "POSTGRES_PORT": str(postgres)}
    with ExitStack() as stack:
        stack.enter_context(running_postgres(cluster, binaries, postgres))
        weed = cluster.process("StatefulSet", "minio")
        log = folder / "minio.log"
        running = stack.enter_context(
            process([str(WEED), *weed.command[1:]], weed.environment, log)
        )
        url = f"http://127.0.0.1:{s3}"
        # 403 to who has no login, as soon as it serves.
        wait_for(running, lambda: requests.get(url, timeout=5).status_code == 403, log)
        made = Trio(
            cluster, postgres, f"http://127.0.0.1:{mlflow}", url, folder / "mlflow.log", running
        )
        for name in ("init-storage", "mlflow-migrate"):
            done = made.job(name)
            assert done.returncode == 0, done.stderr
        made.start_mlflow()
        try:
            done = made.job("mlflow-users")
            assert done.returncode == 0, done.stderr
            yield made
        finally:
            made.stop_mlflow()


@pytest.fixture(scope="session")
def logged(trio: Trio) -> dict[str, str]:
    """A run with a registered model, logged by the user `pipeline`."""
    said = trio.python(
        "pipeline",
        """
        import json, mlflow
        from sklearn.linear_model import LogisticRegression
        client = mlflow.MlflowClient()
        mlflow.set_experiment("of this test")
        with mlflow.start_run() as run:
            mlflow.log_param("kind", "logistic")
            mlflow.log_metric("auc", 0.75)
            model = LogisticRegression().fit([[0.0], [1.0]], [0, 1])
            mlflow.sklearn.log_model(model, name="model", registered_model_name="of_this_test",
                pip_requirements=[], serialization_format="cloudpickle")
        client.set_registered_model_alias("of_this_test", "champion", "1")
        print(json.dumps({"run": run.info.run_id, "experiment": run.info.experiment_id}))
        """,
    )
    found: dict[str, str] = json.loads(said.splitlines()[-1])
    return found

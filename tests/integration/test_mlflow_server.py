"""MLflow's server: what it serves, whom it refuses, how it fails, how Airflow gets to know it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from services import processes
from services.airflow import COMPONENTS, STATSD_PORT
from services.mlflow_server import MlflowError, MlflowServer, client_environment
from services.platform import Platform
from settings import Settings
from tests.conftest import MLFLOW_PASSWORD
from tests.warehouse import Database

SEARCH = "api/2.0/mlflow/experiments/search"


@pytest.fixture
def state(reachable_tmp: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    folder = reachable_tmp / f"state-{request.node.name}"
    folder.mkdir()
    yield folder
    processes.stop(folder, timeout=5)


@pytest.fixture
def server_state(mlflow_server: str, reachable_tmp: Path) -> Path:
    """The state folder of the session's server."""
    return reachable_tmp / "mlflow-server"


def url(database: Database) -> str:
    login = f"postgres:{database.environment['DIABETES_DB_PASSWORD']}"
    return f"postgresql+psycopg2://{login}@127.0.0.1:{database.port}/{database.name}"


def test_run_and_artifact_come_back_through_the_server(
    mlflow_server: str, server_state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in client_environment(mlflow_server).items():
        monkeypatch.setenv(name, value)
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_server)
    run_id = client.create_run(client.create_experiment("of this test")).info.run_id
    client.log_metric(run_id, "auc", 0.5)
    content = os.urandom(3_000_000)
    (tmp_path / "model.bin").write_bytes(content)
    client.log_artifact(run_id, str(tmp_path / "model.bin"), "model")
    client.set_terminated(run_id)

    run = client.get_run(run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"auc": 0.5})
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    (tmp_path / "back").mkdir()
    back = client.download_artifacts(run_id, "model/model.bin", str(tmp_path / "back"))
    assert Path(back).read_bytes() == content
    (kept,) = (server_state / "mlflow" / "artifacts").rglob("model.bin")
    assert kept.read_bytes() == content


def test_foreign_hosts_and_origins_are_refused(mlflow_server: str) -> None:
    def status(**headers: str) -> int:
        return requests.post(
            f"{mlflow_server}/{SEARCH}", json={"max_results": 1}, headers=headers, timeout=30
        ).status_code

    port = mlflow_server.rsplit(":", 1)[1]
    assert status() == status(Host=f"localhost:{port}") == 200
    for host in ("evil.example", f"evil.example:{port}", "10.evil.example", "127.0.0.1:1"):
        assert status(Host=host) == 403, host
    assert status(Origin=mlflow_server) == 200
    assert status(Origin="http://evil.example") == 403


def test_only_the_loopback_address_is_listened_on(mlflow_server: str) -> None:
    port = mlflow_server.rsplit(":", 1)[1]
    # Of a server on every address, this one is answered too.
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.2:{port}/health", timeout=30)


def test_second_start_finds_the_running_server(mlflow_server: str, server_state: Path) -> None:
    before = processes.find(server_state)
    again = MlflowServer(server_state, "unused")
    assert again.start(56599) == again.last_url == mlflow_server
    assert again.wait_until_ready(10) == again.port
    assert processes.find(server_state) == before


def test_password_is_on_no_command_line_and_in_no_log(
    mlflow_server: str, server_state: Path
) -> None:
    assert requests.get(f"{mlflow_server}/{SEARCH}?max_results=1", timeout=30).ok
    said = [" ".join(process.cmdline()) for process in processes.find(server_state)]
    assert len(said) > 1
    said.append((server_state / "logs" / "mlflow.log").read_text())
    for text in said:
        assert MLFLOW_PASSWORD[:10] not in text
        assert "only%20for" not in text


def test_server_is_small_and_takes_nothing_from_the_users_shell(
    state: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "true",
        "MLFLOW_STATIC_PREFIX": "/elsewhere",
    }.items():
        monkeypatch.setenv(name, value)
    server = MlflowServer(state, url(database))
    address = server.start(56510)
    server.wait_until_ready()
    foreign = {"Host": "evil.example"}
    search = f"{address}/{SEARCH}?max_results=1"
    assert requests.get(search, headers=foreign, timeout=30).status_code == 403
    # The command and the web server; no job runner with its consumers.
    assert len(processes.find(state)) == 2


def test_broken_database_ends_the_server(state: Path, database: Database) -> None:
    database.rows("create table alembic_version (version_num text)")
    database.rows("insert into alembic_version values ('of another MLflow')")
    server = MlflowServer(state, url(database))
    server.start(56520)
    with pytest.raises(MlflowError, match=r"MLflow has ended; see .*/logs/mlflow\.log"):
        server.wait_until_ready()
    assert "of another MLflow" in (state / "logs" / "mlflow.log").read_text()


def test_database_that_is_away_takes_no_longer_than_allowed(state: Path) -> None:
    server = MlflowServer(state, "postgresql+psycopg2://mlflow:secret@127.0.0.1:1/mlflow")
    server.start(56530)
    with pytest.raises(MlflowError, match=r"not answer after 3 s; see .*/logs/mlflow\.log"):
        server.wait_until_ready(timeout=3)


def platform(state: Path, uri: str = "") -> Platform:
    return Platform(Settings(state_dir=state, airflow_port=56540, MLFLOW_TRACKING_URI=uri))


def test_server_of_the_users_own_is_used_instead(state: Path, mlflow_server: str) -> None:
    assert platform(state, f"{mlflow_server}/")._start_mlflow(1) == (mlflow_server, None)
    assert processes.find(state) == []


def test_users_own_server_that_is_away_is_one_clear_message(state: Path) -> None:
    for uri, why in (
        ("http://127.0.0.1:1", "does not answer"),
        ("sqlite:///mlflow.db", "is no http"),
    ):
        with pytest.raises(MlflowError, match=f"MLFLOW_TRACKING_URI is {uri}, which {why}"):
            platform(state, uri)._start_mlflow(1)


def test_env_sh_in_the_shell_still_means_our_own_server(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (state / "mlflow").mkdir()
    (state / "mlflow" / "url").write_text("http://127.0.0.1:56550")
    monkeypatch.setattr(MlflowServer, "start", lambda *_: "http://127.0.0.1:56551")
    uri, server = platform(state, "http://127.0.0.1:56550")._start_mlflow(1)
    assert uri == "http://127.0.0.1:56551"
    assert server is not None


@pytest.mark.parametrize(
    "moved", [("http://there:5000", 9125), ("http://here:5000", None), ("http://here:5000", 9126)]
)
def test_airflow_is_stopped_when_what_it_talks_to_has_moved_and_only_then(
    state: Path, moved: tuple[str, int | None]
) -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    variables = {
        "MLFLOW_TRACKING_URI": "http://here:5000",
        "AIRFLOW__API__PORT": "56545",
        STATSD_PORT: "9125",
    }
    for name in (*COMPONENTS, "mlflow"):
        processes.start(name, sleeper, state, variables, state / "log")
    assert platform(state)._airflow_port("http://here:5000", 9125) == 56545
    assert len(processes.find(state)) == 5
    free = processes.free_port(56540)
    assert platform(state)._airflow_port(*moved) == free
    assert processes.find(state, *COMPONENTS) == []
    assert len(processes.find(state, "mlflow")) == 1

"""Killed services for real: Prometheus with our rules and Alertmanager with our routes tell it.

The API, PostgreSQL and MLflow are killed as a machine would kill them. What has to be told is told
by a webhook, as an operator would get it, from the moment of the kill on.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from services import processes
from services.mlflow_server import MlflowServer, client_environment
from services.observability import (
    ALERTMANAGER,
    PROMETHEUS,
    Alertmanager,
    Prometheus,
    find_tool,
)
from services.postgres import Postgres, address
from services.web import API, EXPORTER
from settings import PROJECT_ROOT

LIMIT_SECONDS = 120
DEAD = {"ApiDown", "PostgresDown", "MlflowDown"}
# As in the cluster; `make run` asks three times as often.
SCRAPE = "15s"
_PASSWORD = "only-for-tests"

pytestmark = [
    pytest.mark.timeout(420),
    pytest.mark.skipif(
        not (find_tool(PROMETHEUS, "") and find_tool(ALERTMANAGER, "")),
        reason="no prometheus or no alertmanager on the PATH",
    ),
]


@dataclass(slots=True)
class Receiver:
    """What Alertmanager's webhook was told: the moment by name and status."""

    told: dict[tuple[str, str], float] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)

    def take(self, message: dict[str, Any]) -> None:
        for alert in message["alerts"]:
            self.alerts.append(alert)
            key = (alert["labels"]["alertname"], alert["status"])
            self.told.setdefault(key, time.monotonic())

    def seconds(self, name: str, since: float, status: str = "firing") -> float:
        """How long after a moment an alert was told of; waits for it."""
        deadline = since + LIMIT_SECONDS
        while (moment := self.told.get((name, status), 0.0)) < since:
            assert time.monotonic() < deadline, f"{name} not {status} in time: {self.told}"
            time.sleep(0.2)
        return moment - since


@dataclass(slots=True)
class Watched:
    """A small platform and those who watch it."""

    state: Path
    receiver: Receiver
    prometheus: Prometheus
    postgres: Postgres

    def kill(self, name: str) -> float:
        """Kill a service and its children with no chance to say goodbye; return the moment."""
        for process in processes.find(self.state, name):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        return time.monotonic()

    def kill_postgres(self) -> float:
        file = next(self.state.rglob("postmaster.pid"))
        psutil.Process(int(file.read_text().splitlines()[0])).send_signal(signal.SIGKILL)
        return time.monotonic()

    def raised(self, evaluations: int = 2) -> set[str]:
        """Alerts of dead services that are pending or firing, after so many more evaluations."""
        for _ in range(evaluations):
            self.evaluated()
        answer = requests.get(f"{self.prometheus.url}/api/v1/alerts", timeout=10).json()
        return {alert["labels"]["alertname"] for alert in answer["data"]["alerts"]} & DEAD

    def evaluated(self) -> None:
        """Wait until these alerts' rules are evaluated once more."""
        before = self._last_evaluation()
        deadline = time.monotonic() + 60
        while self._last_evaluation() == before:
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def _last_evaluation(self) -> str:
        answer = requests.get(f"{self.prometheus.url}/api/v1/rules", timeout=10).json()
        (moment,) = [
            str(group["lastEvaluation"])
            for group in answer["data"]["groups"]
            if DEAD & {rule["name"] for rule in group["rules"]}
        ]
        return moment

    def up(self) -> dict[str, float]:
        answer = requests.get(
            f"{self.prometheus.url}/api/v1/query", params={"query": "up"}, timeout=10
        ).json()
        return {row["metric"]["job"]: float(row["value"][1]) for row in answer["data"]["result"]}


@pytest.fixture(scope="module")
def receiver() -> Iterator[tuple[Receiver, str]]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            receiver.take(json.loads(self.rfile.read(length)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield receiver, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


def with_receiver(folder: Path, url: str) -> Path:
    """The example configuration, its routes as they are, every receiver at this address."""
    example = PROJECT_ROOT / "monitoring" / "prometheus" / "alertmanager.yaml"
    loaded = yaml.safe_load(example.read_text())
    hooks = [hook for made in loaded["receivers"] for hook in made.get("webhook_configs", [])]
    assert hooks
    for hook in hooks:
        hook["url"] = url
    file = folder / "alertmanager-test.yaml"
    file.write_text(yaml.safe_dump(loaded))
    return file


@pytest.fixture(scope="module")
def watched(reachable_tmp: Path, receiver: tuple[Receiver, str]) -> Iterator[Watched]:
    state = reachable_tmp / "watched"
    postgres = Postgres(state)
    try:
        port = postgres.start(56800, _PASSWORD)
        owners = {"diabetes": "diabetes-of-tests", "mlflow": "mlflow-of-tests"}
        postgres.ensure_databases(port, _PASSWORD, owners)
        mlflow = MlflowServer(
            state, f"postgresql+psycopg2://{address(port, 'mlflow', owners['mlflow'])}"
        )
        uri = mlflow.start(56810)
        variables = {
            **client_environment(uri),
            "DIABETES_STATE_DIR": str(state),
            "DIABETES_DB_HOST": "127.0.0.1",
            "DIABETES_DB_PORT": str(port),
            "DIABETES_DB_USER": "diabetes",
            "DIABETES_DB_PASSWORD": owners["diabetes"],
            "DIABETES_DB_NAME": "diabetes",
            "DIABETES_PREDICTION_LOG_KEY": _PASSWORD,
            "DIABETES_AIRFLOW_URL": "",
        }
        targets = {}
        for job, service, preferred in (("api", API, 56820), ("pipeline", EXPORTER, 56830)):
            at = service.port(state, preferred, variables)
            service.start(state, at, variables)
            service.wait_until_up(state, at)
            targets[job] = f"127.0.0.1:{at}"
        targets["mlflow"] = f"127.0.0.1:{mlflow.wait_until_ready()}"
        alertmanager = Alertmanager(state, find_tool(ALERTMANAGER, "") or Path())
        alertmanager.start(with_receiver(state, receiver[1]), preferred_port=56840)
        prometheus = Prometheus(state, find_tool(PROMETHEUS, "") or Path())
        prometheus.start(
            targets,
            alertmanager=f"127.0.0.1:{alertmanager.wait_until_ready()}",
            preferred_port=56850,
            scrape_interval=SCRAPE,
            evaluation_interval=SCRAPE,
        )
        prometheus.wait_until_ready()
        yield Watched(state, receiver[0], prometheus, postgres)
    finally:
        processes.stop(state)
        postgres.stop()
        shutil.rmtree(state, ignore_errors=True)


def test_a_healthy_platform_raises_no_alert_of_a_dead_service(watched: Watched) -> None:
    jobs = {"alertmanager", "api", "mlflow", "pipeline", "prometheus"}
    deadline = time.monotonic() + 60
    while watched.up() != dict.fromkeys(jobs, 1.0):
        assert time.monotonic() < deadline, watched.up()
        time.sleep(0.5)
    assert watched.raised() == set()


def test_killed_api_and_mlflow_are_told_of_within_two_minutes(watched: Watched) -> None:
    killed = {"MlflowDown": watched.kill("mlflow"), "ApiDown": watched.kill(API.name)}
    # What is asked of a healthy platform above sees them long before they are told.
    assert watched.raised() == set(killed)
    for name, moment in killed.items():
        assert watched.receiver.seconds(name, moment) < LIMIT_SECONDS
    (alert, *_) = [a for a in watched.receiver.alerts if a["labels"]["alertname"] == "ApiDown"]
    assert alert["labels"]["severity"] == "page"
    assert "runbooks.md#apidown" in alert["annotations"]["runbook_url"].lower()


def test_killed_postgres_is_told_of_within_two_minutes(watched: Watched) -> None:
    assert "PostgresDown" not in watched.raised(evaluations=0)
    assert watched.receiver.seconds("PostgresDown", watched.kill_postgres()) < LIMIT_SECONDS

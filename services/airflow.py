"""A real Airflow on the local machine: its environment, its four processes, its REST API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests

from services import processes
from services.mlflow_server import client_environment
from services.postgres import address
from services.state import Secrets
from settings import PROJECT_ROOT, Settings

COMPONENTS = ("api-server", "scheduler", "dag-processor", "triggerer")
ADMIN = "admin"
STATSD_PORT = "AIRFLOW__METRICS__STATSD_PORT"
FINISHED = frozenset({"success", "failed", "upstream_failed", "skipped", "removed"})


class AirflowError(Exception):
    """Airflow did not do what was asked; the message says what and where its logs are."""


def environment(
    chosen: Settings,
    secrets: Secrets,
    postgres_port: int,
    airflow_port: int,
    tracking_uri: str,
    statsd_port: int | None = None,
) -> dict[str, str]:
    """Every variable that Airflow, Cosmos, dbt, MLflow and our packages need, for any process.

    Args:
        chosen: the settings.
        secrets: of the state folder.
        postgres_port: of the embedded server.
        airflow_port: of Airflow's API server.
        tracking_uri: of MLflow.
        statsd_port: UDP port of the exporter that Airflow counts for; None where there is none.
    """
    home = chosen.state_dir / "airflow"

    def database(name: str) -> str:
        return address(postgres_port, name, secrets[name])

    url = f"http://127.0.0.1:{airflow_port}"
    documentation = {
        "diabetes": {
            "name": "diabetes",
            "dir": str(chosen.state_dir / "dbt"),
            "index": "index.html",
        }
    }
    return {
        "PYTHONPATH": str(PROJECT_ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "DIABETES_STATE_DIR": str(chosen.state_dir),
        "DIABETES_DB_HOST": "127.0.0.1",
        "DIABETES_DB_PORT": str(postgres_port),
        "DIABETES_DB_USER": "diabetes",
        "DIABETES_DB_PASSWORD": secrets["diabetes"],
        "DIABETES_DB_NAME": "diabetes",
        "DIABETES_PREDICTION_LOG_KEY": secrets["identifiers"],
        "DIABETES_DBT_MANIFEST": str(chosen.state_dir / "dbt" / "manifest.json"),
        "AIRFLOW_HOME": str(home),
        "AIRFLOW_CONN_POSTGRES_DEFAULT": f"postgres://{database('diabetes')}",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"postgresql+psycopg2://{database('airflow')}",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__DAGS_FOLDER": str(PROJECT_ROOT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        # A producer, the roots of the dbt graph and some room; each worker is a process.
        "AIRFLOW__CORE__PARALLELISM": "16",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__FERNET_KEY": secrets["fernet"],
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{ADMIN}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(home / "passwords.json"),
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(airflow_port),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW__API__SECRET_KEY": secrets["api"],
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets["jwt"],
        # On one machine nothing is gained by waiting: look for work ten times a second.
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.1",
        "AIRFLOW__SCHEDULER__ENABLE_TRACEMALLOC": "False",
        # A new DAG file is seen after half a minute, not after five.
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "30",
        "AIRFLOW__COSMOS__DBT_DOCS_PROJECTS": json.dumps(documentation),
        "AIRFLOW__COSMOS__ENABLE_TELEMETRY": "False",
        **client_environment(tracking_uri),
        **(statsd_environment(statsd_port) if statsd_port else {}),
        "DO_NOT_TRACK": "1",
        "SCARF_ANALYTICS": "false",
        "DBT_SEND_ANONYMOUS_USAGE_STATS": "False",
    }


def statsd_environment(port: int) -> dict[str, str]:
    """With which Airflow sends its metrics, tags as InfluxDB writes them, to this UDP port."""
    return {
        "AIRFLOW__METRICS__STATSD_ON": "True",
        "AIRFLOW__METRICS__STATSD_HOST": "127.0.0.1",
        STATSD_PORT: str(port),
        "AIRFLOW__METRICS__STATSD_PREFIX": "airflow",
        "AIRFLOW__METRICS__STATSD_INFLUXDB_ENABLED": "True",
    }


@dataclass(frozen=True, slots=True)
class TaskState:
    """One task of a run as its state changed; of a mapped task, one of its instances."""

    task_id: str
    state: str
    seconds: float
    map_index: int = -1
    label: str = ""

    @property
    def name(self) -> str:
        """The task, and what a mapped one was mapped over."""
        return (
            f"{self.task_id} [{self.label or self.map_index}]"
            if self.map_index >= 0
            else self.task_id
        )


class Airflow:
    """The four processes of one Airflow and its REST API.

    Args:
        state: folder of the platform's state.
        variables: what `environment` returned.
        password: of the user `admin`.
    """

    def __init__(self, state: Path, variables: dict[str, str], password: str) -> None:
        self._state = state
        self._environment = {**os.environ, **variables}
        self._password = password
        self.url = variables["AIRFLOW__API__BASE_URL"]
        self._logs = state / "logs"
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy has no business on the loopback address

    def migrate(self) -> None:
        """Bring the metadata database to this version of Airflow (skipped where it is)."""
        from importlib.metadata import version

        home = Path(self._environment["AIRFLOW_HOME"])
        home.mkdir(parents=True, exist_ok=True)
        done = home / "migrated"
        if done.exists() and done.read_text() == version("apache-airflow"):
            return
        self._logs.mkdir(parents=True, exist_ok=True)
        log = self._logs / "migrate.log"
        with log.open("wb") as output:
            code = subprocess.run(
                ["airflow", "db", "migrate"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if code:
            raise AirflowError(f"airflow db migrate failed (exit code {code}), see {log}")
        done.write_text(version("apache-airflow"))

    def start(self) -> None:
        """Start the processes that are not running."""
        passwords = Path(self._environment["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"])
        passwords.touch(mode=0o600)
        passwords.write_text(json.dumps({ADMIN: self._password}))
        for component in COMPONENTS:
            if processes.find(self._state, component):
                continue
            command = ["airflow", component]
            variables = dict(self._environment)
            if component in ("scheduler", "triggerer"):
                # Logs are read from the disk here; a log server would only take a fixed port.
                command.append("--skip-serve-logs")
            if component == "scheduler":
                preload = PROJECT_ROOT / "services" / "preload"
                variables["PYTHONPATH"] += f"{os.pathsep}{preload}"
            log = self._logs / f"{component}.log"
            processes.start(component, command, self._state, variables, log)

    def wait_until_healthy(self, timeout: float = 180) -> None:
        """Return when all four components report themselves healthy.

        Raises:
            AirflowError: one of them has ended, or the time is over.
        """
        deadline = time.monotonic() + timeout
        waiting_for = list(COMPONENTS)
        while time.monotonic() < deadline:
            for component in COMPONENTS:
                if not processes.find(self._state, component):
                    raise AirflowError(
                        f"Airflow's {component} has ended; see {self._logs}/{component}.log"
                    )
            try:
                answer = self._session.get(f"{self.url}/api/v2/monitor/health", timeout=5).json()
                waiting_for = [
                    name
                    for name in ("metadatabase", "scheduler", "dag_processor", "triggerer")
                    if answer[name]["status"] != "healthy"
                ]
                if not waiting_for:
                    return
            except (requests.RequestException, ValueError):
                pass
            time.sleep(0.5)
        raise AirflowError(
            f"Airflow is not healthy after {timeout:.0f} s (waiting for {', '.join(waiting_for)}); "
            f"see {self._logs}"
        )

    def call(self, method: str, path: str, **arguments: Any) -> Any:
        """Call the REST API (`path` below /api/v2) and return its JSON answer.

        Raises:
            AirflowError: Airflow can't be reached or refuses.
        """
        try:
            if "Authorization" not in self._session.headers:
                answer = self._session.post(
                    f"{self.url}/auth/token",
                    json={"username": ADMIN, "password": self._password},
                    timeout=30,
                )
                answer.raise_for_status()
                self._session.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
            answer = self._session.request(
                method, f"{self.url}/api/v2/{path}", timeout=30, **arguments
            )
            if answer.status_code == requests.codes.unauthorized:
                del self._session.headers["Authorization"]
                return self.call(method, path, **arguments)
            answer.raise_for_status()
            return answer.json()
        except requests.HTTPError as error:
            raise AirflowError(f"Airflow refused {method} {path}: {error.response.text}") from error
        except requests.RequestException as error:
            raise AirflowError(
                f"Airflow at {self.url} does not answer {method} {path}: {error}"
            ) from error

    def wait_for_dag(self, dag_id: str, newer_than: float, timeout: float = 120) -> None:
        """Return when the DAG has been read from its file after the moment `newer_than`.

        A run that starts earlier would lose tasks in the middle when the new version arrives.

        Args:
            dag_id: the DAG.
            newer_than: seconds since the epoch, when the file or dbt's manifest last changed.
            timeout: seconds to wait.

        Raises:
            AirflowError: its file can't be imported, or the time is over.
        """
        deadline = time.monotonic() + timeout
        asked = False
        while time.monotonic() < deadline:
            errors = self.call("GET", "importErrors")["import_errors"]
            if errors:
                raise AirflowError(
                    f"{errors[0]['filename']} can't be imported:\n{errors[0]['stack_trace']}"
                )
            found = [dag for dag in self.call("GET", "dags")["dags"] if dag["dag_id"] == dag_id]
            if found:
                parsed = datetime.fromisoformat(found[0]["last_parsed_time"])
                if parsed.timestamp() > newer_than:
                    return
            if found and not asked:
                self.call("PUT", f"parseDagFile/{found[0]['file_token']}")
                asked = True
            time.sleep(0.5)
        raise AirflowError(f"Airflow found no DAG {dag_id} within {timeout:.0f} s")

    def trigger(self, dag_id: str, conf: dict[str, Any]) -> str:
        """Start a run with these Params and return its run id."""
        body = {"logical_date": None, "conf": conf}
        return str(self.call("POST", f"dags/{dag_id}/dagRuns", json=body)["dag_run_id"])

    def run_state(self, dag_id: str, run_id: str) -> str:
        """State of a run: queued, running, success or failed."""
        return str(self.call("GET", f"dags/{dag_id}/dagRuns/{quote(run_id, safe='')}")["state"])

    def follow(self, dag_id: str, run_id: str, timeout: float) -> Iterator[TaskState]:
        """Yield each task of a run when it starts and when it ends, until the run has ended.

        Raises:
            AirflowError: the run takes longer than `timeout` seconds.
        """
        path = f"dags/{dag_id}/dagRuns/{quote(run_id, safe='')}"
        deadline = time.monotonic() + timeout
        seen: dict[tuple[str, int], str] = {}
        while True:
            run = self.call("GET", path)
            tasks = self.call("GET", f"{path}/taskInstances", params={"limit": 500})
            for task in sorted(tasks["task_instances"], key=lambda task: task["end_date"] or "9"):
                state = task["state"] or ""
                shown = state in FINISHED or state in ("running", "up_for_retry")
                key = (task["task_id"], task["map_index"])
                if shown and seen.get(key) != state:
                    seen[key] = state
                    label = task["rendered_map_index"] or ""
                    yield TaskState(key[0], state, task["duration"] or 0.0, key[1], label)
            if run["state"] in ("success", "failed"):
                return
            if time.monotonic() > deadline:
                raise AirflowError(
                    f"run {run_id} of {dag_id} is still {run['state']} after {timeout:.0f} s; it "
                    f"goes on in the background, see {self.url}/dags/{dag_id}"
                )
            time.sleep(0.5)

    def wait_for_scheduled_run(
        self, dag_id: str, known: frozenset[str], timeout: float = 120
    ) -> str:
        """Return the id of the first run that is not in `known`: one that the scheduler made.

        Raises:
            AirflowError: there is none within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if new := self.runs(dag_id) - known:
                return min(new)
            time.sleep(0.5)
        raise AirflowError(
            f"the scheduler started no run of {dag_id} within {timeout:.0f} s; is the DAG paused? "
            f"See {self.url}/dags/{dag_id}"
        )

    def runs(self, dag_id: str) -> frozenset[str]:
        """Ids of the newest hundred runs of a DAG."""
        path = f"dags/{dag_id}/dagRuns"
        found = self.call("GET", path, params={"limit": 100, "order_by": "-run_after"})
        return frozenset(run["dag_run_id"] for run in found["dag_runs"])

    def task_log(
        self, dag_id: str, run_id: str, task_id: str, map_index: int = -1, lines: int = 15
    ) -> list[str]:
        """Last lines of a task's newest log, as text, with the messages of its exceptions."""
        path = f"dags/{dag_id}/dagRuns/{quote(run_id, safe='')}/taskInstances/{task_id}"
        instance = f"{path}/{map_index}" if map_index >= 0 else path
        number = self.call("GET", instance)["try_number"] or 1
        content = self.call(
            "GET",
            f"{path}/logs/{number}",
            params={"map_index": map_index},
            headers={"Accept": "application/json"},
        )
        said = []
        for entry in content["content"]:
            if isinstance(entry, dict):
                said.append(entry.get("event") or "")
                said += [error["exc_value"] for error in entry.get("error_detail") or []]
        return [line for line in said if line and not line.startswith("::")][-lines:]

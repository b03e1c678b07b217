"""MLflow's tracking server on the local machine, or the one that the user has elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import requests

from services import processes

_MLFLOW = Path(sys.executable).with_name("mlflow")  # of this environment, whatever the PATH says
_NAME = "mlflow"


class MlflowError(Exception):
    """MLflow did not start or does not answer; the message says where its log is."""


def client_environment(uri: str) -> dict[str, str]:
    """What MLflow's client needs to know, for any process of ours."""
    return {
        "MLFLOW_TRACKING_URI": uri,
        # By default the client repeats a call for minutes before it says that nobody answers.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
        # Artifacts lie on the server's disk, which knows no parts.
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def check(uri: str) -> None:
    """See whether a server that is not ours answers.

    Raises:
        MlflowError: it does not, or not as MLflow does.
    """
    said = f"MLFLOW_TRACKING_URI is {uri}"
    if not uri.startswith(("http://", "https://")):
        raise MlflowError(
            f"{said}, which is no http(s) address; unset it to have a server started here"
        )
    try:
        status = requests.get(f"{uri}/health", timeout=10).status_code
    except requests.RequestException as error:
        raise MlflowError(
            f"{said}, which does not answer; unset it to have a server started here ({error})"
        ) from error
    # Whether it lets us in is between it and MLflow's client, which has the login.
    if status not in (requests.codes.ok, requests.codes.unauthorized, requests.codes.forbidden):
        raise MlflowError(
            f"{said}, where /health answers {status}: no MLflow server, or a sick one"
        )


class MlflowServer:
    """The tracking server. It knows no login, so it listens on the loopback address only.

    Args:
        state: folder of the platform's state; artifacts go to `mlflow/artifacts/` below it.
        database: URL of its database, as SQLAlchemy writes it.
    """

    def __init__(self, state: Path, database: str) -> None:
        self._state = state
        self._home = state / "mlflow"
        self._log = state / "logs" / "mlflow.log"
        self._database = database
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy has no business on the loopback address

    @property
    def port(self) -> int | None:
        """The port of the server that runs; None where there is none."""
        running = processes.environments(self._state, _NAME)
        return int(running[0]["MLFLOW_PORT"]) if running else None

    @property
    def last_url(self) -> str:
        """Where the server is or was last; empty before the first start."""
        file = self._home / "url"
        return file.read_text() if file.exists() else ""

    def start(self, preferred_port: int) -> str:
        """Start the server if it is down and return its URL; it is not ready yet.

        Raises:
            MlflowError: MLflow is not installed.
        """
        if running := self.port:
            return _url(running)
        if not _MLFLOW.exists():
            raise MlflowError(f"{_MLFLOW} is not there; run make setup")
        port = processes.free_port(preferred_port)
        self._home.mkdir(parents=True, exist_ok=True)
        (self._home / "url").write_text(_url(port))
        hosts = [f"{host}:{port}" for host in ("127.0.0.1", "localhost")]
        command = [
            str(_MLFLOW),
            "server",
            "--host=127.0.0.1",
            "--workers=1",
            "--serve-artifacts",
            f"--artifacts-destination={self._home / 'artifacts'}",
            f"--allowed-hosts={','.join(hosts)}",
            f"--cors-allowed-origins={','.join(f'http://{host}' for host in hosts)}",
        ]
        if find_spec("prometheus_flask_exporter"):
            # A file a process, which counts what processes that have ended counted: begin anew.
            metrics = self._home / "metrics"
            shutil.rmtree(metrics, ignore_errors=True)
            command.append(f"--expose-prometheus={metrics}")
        # What the user's shell tells MLflow, its client above all, is not meant for this server.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MLFLOW_", "_MLFLOW_"))
        }
        variables = {
            # On a command line everyone could read the password.
            "MLFLOW_BACKEND_STORE_URI": self._database,
            "MLFLOW_PORT": str(port),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # Eight more processes and 1.3 GB, for jobs of generative AI.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        processes.start(_NAME, command, self._state, {**inherited, **variables}, self._log)
        return _url(port)

    def wait_until_ready(self, timeout: float = 180) -> int:
        """Return the port when the server answers and its database too.

        Raises:
            MlflowError: it has ended, or the time is over.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            port = self.port
            if port is None:
                raise MlflowError(f"MLflow has ended; see {self._log}")
            if self._answers(_url(port)):
                return port
            time.sleep(0.2)
        raise MlflowError(f"MLflow does not answer after {timeout:.0f} s; see {self._log}")

    def _answers(self, url: str) -> bool:
        # /health alone does not look at the database.
        paths = ("health", "api/2.0/mlflow/experiments/search?max_results=1")
        try:
            return all(self._session.get(f"{url}/{path}", timeout=10).ok for path in paths)
        except requests.RequestException:
            return False


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"

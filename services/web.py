"""The prediction API, the page and the pipeline's exporter on the local machine."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import requests

from services import processes


class WebError(Exception):
    """One of them did not start; the message says where its log is."""


@dataclass(frozen=True, slots=True)
class Web:
    """One web service of ours, a Python package that is run as a process.

    Attributes:
        name: by which the process is found again.
        title: for messages.
        package: run by `python -m`.
        port_variable: the setting that tells it where to listen.
        health: path that answers 200 as soon as it serves.
        depends_on: variables whose change means that it has to be started anew.
        arguments: of the package.
    """

    name: str
    title: str
    package: str
    port_variable: str
    health: str
    depends_on: tuple[str, ...]
    arguments: tuple[str, ...] = ()

    def port(self, state: Path, preferred: int, environment: Mapping[str, str]) -> int:
        """The port it listens on, or will; one that knows old addresses is ended first."""
        known = processes.environments(state, self.name)
        if known and all(
            variables.get(name) == environment.get(name)
            for variables in known
            for name in self.depends_on
        ):
            return int(known[0][self.port_variable])
        processes.stop(state, self.name, timeout=70)
        return processes.free_port(preferred)

    def start(self, state: Path, port: int, environment: Mapping[str, str]) -> None:
        """Start it if it is down."""
        if not processes.find(state, self.name):
            command = [sys.executable, "-m", self.package, *self.arguments]
            variables = {**os.environ, **environment, self.port_variable: str(port)}
            processes.start(self.name, command, state, variables, self._log(state))

    def wait_until_up(self, state: Path, port: int, timeout: float = 60) -> None:
        """Wait until it serves.

        Raises:
            WebError: it has ended, or the time is over.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if not processes.find(state, self.name):
                raise WebError(f"{self.title} has ended; see {self._log(state)}")
            if answers(f"http://127.0.0.1:{port}{self.health}"):
                return
            time.sleep(0.1)
        raise WebError(
            f"{self.title} does not answer after {timeout:.0f} s; see {self._log(state)}"
        )

    def _log(self, state: Path) -> Path:
        return state / "logs" / f"{self.name}.log"


_DATABASE = ("DIABETES_DB_PORT", "DIABETES_DB_PASSWORD")
API = Web(
    "prediction-api",
    "Prediction API",
    "serving",
    "DIABETES_API_PORT",
    "/livez",
    ("MLFLOW_TRACKING_URI", *_DATABASE),
)
EXPORTER = Web(
    "pipeline-exporter",
    "Pipeline's exporter",
    "monitoring",
    "DIABETES_EXPORTER_PORT",
    "/metrics",
    (*_DATABASE, "DIABETES_AIRFLOW_URL", "DIABETES_AIRFLOW_PASSWORD"),
    ("exporter",),
)
PAGE = Web("page", "Page", "ui", "DIABETES_UI_PORT", "/_stcore/health", ("DIABETES_API_URL",))


def answers(url: str) -> bool:
    """Whether a GET gives 200."""
    session = requests.Session()
    session.trust_env = False  # a proxy has no business on the loopback address
    try:
        return session.get(url, timeout=5).ok
    except requests.RequestException:
        return False


def served_version(url: str, wanted: str, timeout: float) -> str:
    """The version that the API serves: the wanted one, if it comes in time.

    Returns:
        Its number; empty where none is served.
    """
    session = requests.Session()
    session.trust_env = False
    deadline = time.monotonic() + timeout
    version = ""
    while version != wanted and time.monotonic() < deadline:
        answer = session.get(f"{url}/readyz", timeout=10)
        version = answer.json()["model_version"] if answer.ok else ""
        if version != wanted:
            time.sleep(0.2)
    return version

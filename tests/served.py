"""A registered model and the prediction API on it, as real processes, for the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from ingestion.contract import FIELDS
from ingestion.synthetic import csv_blocks
from services.mlflow_server import client_environment
from services.processes import free_port
from serving.registry import Registry
from settings import PROJECT_ROOT, Settings, settings
from tests.warehouse import Database

WARNINGS = [
    # mlflow warns of its own use of pandas and of type hints in itself.
    pytest.mark.filterwarnings("ignore:Operation with range:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:(?s).*Any type hint is inferred"),
]
"""For tests that train or read a registered model."""


def wait_until(holds: Callable[[], object], timeout: float = 30) -> None:
    """Return as soon as something holds."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.05)


def synthetic(rows: int, seed: int = 7) -> list[list[str]]:
    """Rows of a synthetic CSV, the header not among them."""
    text = b"".join(csv_blocks(rows, seed)).decode()
    return [line.split(",") for line in text.splitlines()[1:]]


def as_json(row: list[str]) -> dict[str, Any]:
    """A row of a CSV as a caller of the JSON API sends it."""
    numbers = ("id", "count", "code")
    return {
        field.name: int(value) if field.kind in numbers else value
        for field, value in zip(FIELDS, row, strict=True)
        if field.name != "readmitted"
    }


@dataclass(frozen=True, slots=True)
class Registered:
    """Two versions of `diabetes_readmission` that learnt from synthetic encounters.

    Attributes:
        database: what they learnt from; the prediction log goes there too.
        uri: of the MLflow server.
        champion, other: their numbers; the alias `champion` is on the first.
        models: the service's cache with the champion in it; None where it has to be downloaded.
    """

    database: Database
    uri: str
    champion: str
    other: str
    models: Path | None = None

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def crown(self, number: str) -> None:
        """Move the alias `champion`."""
        self.client.set_registered_model_alias("diabetes_readmission", "champion", number)


def register(database: Database, definition: dict[str, Any], uri: str, folder: Path) -> Registered:
    """Train two quick models on a built database and register them; the first is champion."""
    numbers = [
        train(database, definition, uri, folder, candidate)
        for candidate in ("lightgbm", "logistic_regression")
    ]
    pair = Registered(database, uri, *numbers, folder / "models")
    pair.crown(pair.champion)
    # Once, so that not every service of the tests has to: that takes longer than most tests.
    registry = Registry(Settings(MLFLOW_TRACKING_URI=uri))
    version = registry.find("champion")
    assert version
    registry.fetch(version, folder / "models" / pair.champion)
    return pair


def train(
    database: Database, definition: dict[str, Any], uri: str, folder: Path, candidate: str
) -> str:
    """Train a quick model on a built database and return the number of its version.

    dbt would say the same of the features as the definition does, and take seconds.

    So few encounters make no model that the real gates would let pass: here any does.
    """
    from training import evaluate, features, gates
    from training.pipeline import EXPERIMENT, Training
    from training.plan import Spec
    from training.tracking import Tracker

    runs = folder / "training"
    runs.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in {**client_environment(uri), **database.environment}.items():
            monkeypatch.setenv(name, value)
        settings.cache_clear()
        bounds = tuple((name, None, None) for name, *_ in gates._BOUNDS)
        monkeypatch.setattr(gates, "_BOUNDS", bounds)
        monkeypatch.setattr(gates, "LEAK_AUROC", 1.0)
        monkeypatch.setattr(features, "read", lambda dsn: definition)
        monkeypatch.setattr(evaluate, "report", partial(evaluate.report, resamples=50))
        training = Training(database.dsn, Tracker(uri, runs, EXPERIMENT), decided_by="a test")
        spec = Spec(candidates=(candidate,), trials=1, threads=1)
        answer = training.run(spec, learning_curve=False)
    settings.cache_clear()
    return str(answer["version"])


@dataclass(slots=True)
class Api:
    """One process of the prediction API.

    Attributes:
        process: it.
        url: where it listens.
        state: its state folder (cache of models, spool).
        log: what it says.
    """

    process: subprocess.Popen[bytes]
    url: str
    state: Path
    log: Path
    session: requests.Session = field(default_factory=requests.Session)

    def wait_until_ready(self, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with suppress(requests.RequestException):
                if self.session.get(f"{self.url}/readyz", timeout=5).ok:
                    return
            time.sleep(0.05)
        raise AssertionError(f"not ready after {timeout} s:\n{self.log.read_text()}")

    def readiness(self) -> str:
        """What /readyz says; empty as long as nobody listens."""
        try:
            return self.get("/readyz").text
        except requests.ConnectionError:
            return ""

    def get(self, path: str, **arguments: Any) -> requests.Response:
        return self.session.get(f"{self.url}{path}", timeout=60, **arguments)

    def post(self, path: str, **arguments: Any) -> requests.Response:
        return self.session.post(f"{self.url}{path}", timeout=120, **arguments)

    def metric(self, line: str) -> float:
        """Value of one sample, named as /metrics writes it; 0 where it is not there."""
        for found in self.get("/metrics").text.splitlines():
            if found.startswith(f"{line} "):
                return float(found.rsplit(" ", 1)[1])
        return 0.0

    def stop(self, timeout: float = 30) -> int:
        """SIGTERM, and the exit code."""
        self.session.close()
        self.process.terminate()
        return self.process.wait(timeout)


@contextmanager
def running_api(
    state: Path,
    registered: Registered,
    *,
    wait: bool = True,
    empty_cache: bool = False,
    **variables: str,
) -> Iterator[Api]:
    """The API on a free port; stopped at the end, by force if need be.

    Args:
        state: its state folder.
        registered: whose models it serves and whose database it logs to.
        wait: for a model.
        empty_cache: whether it has to download what it serves.
        variables: settings other than those, by their environment variable.
    """
    port = free_port(57000 + os.getpid() % 1000)
    log = state / "api.log"
    state.mkdir(parents=True, exist_ok=True)
    cache = state / "serving" / "models"
    if registered.models and not cache.exists() and not empty_cache:
        shutil.copytree(registered.models, cache)
    environment: Mapping[str, str] = {
        **os.environ,
        **client_environment(registered.uri),
        **registered.database.environment,
        "DIABETES_STATE_DIR": str(state),
        "DIABETES_API_PORT": str(port),
        "DIABETES_API_POLL_SECONDS": "0.3",
        "DIABETES_API_BATCH_WORKERS": "1",
        "DIABETES_PREDICTION_LOG_KEY": "only for tests",
        **variables,
    }
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving"],
            cwd=PROJECT_ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    api = Api(process, f"http://127.0.0.1:{port}", state, log)
    try:
        if wait:
            api.wait_until_ready()
        yield api
    finally:
        api.session.close()
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

"""A prediction service of the measurement's own: PostgreSQL, MLflow, a trained model, the API.

Nothing of the platform is touched, and nothing is left running.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from bench.files import base_file
from bench.load import HOST
from bench.server import Server, running_server
from bench.serving import Running, service, settle
from bench.usage import run
from services import processes
from services.dbt import PROJECT
from services.mlflow_server import MlflowServer, client_environment
from services.processes import free_port
from settings import REGISTERED_MODEL, Settings

ALIAS = "load-test"
"""Its own, so that a model is served whatever the gates of training say of it."""

_DATABASE = "load"
_MLFLOW_PORT, _API_PORT = 55400, 57900

log = logging.getLogger("loadtest")


class Stand:
    """Everything that the API needs, up and filled.

    Args:
        server: PostgreSQL, with the tables of the pipeline and the prediction log.
        uri: of MLflow.
        data: what the model learnt from, in words.
        folder: for state folders of the API.
    """

    def __init__(self, server: Server, uri: str, data: str, folder: Path) -> None:
        self._server = server
        self._uri = uri
        self.data = data
        self._folder = folder

    def api(self, name: str, **variables: str) -> AbstractContextManager[Running]:
        """`python -m serving` with a state folder of that name, and settings of one's own.

        Raises:
            BenchError: it did not start.
        """
        state = self._folder / name
        state.mkdir(exist_ok=True)
        port = free_port(_API_PORT)
        environment = {
            **self._server.environment(_DATABASE),
            **client_environment(self._uri),
            "DIABETES_STATE_DIR": str(state),
            "DIABETES_API_HOST": HOST,
            "DIABETES_API_PORT": str(port),
            "DIABETES_API_ALIAS": ALIAS,
            "DIABETES_API_KEY_HASHES": "",
            "DIABETES_API_SHADOW": "false",
            "DIABETES_PREDICTION_LOG": "true",
            "DIABETES_PREDICTION_LOG_KEY": "of the load test",
            **variables,
        }
        command = [sys.executable, "-m", "serving"]
        return service(command, environment, port, "/readyz", state / "output.log")

    def logged(self, api: Running) -> set[str]:
        """Ids in the prediction log, once the service has come to rest."""
        settle(api)
        rows = self._server.rows(_DATABASE, "select prediction_id::text from inference.predictions")
        return {number for (number,) in rows}


@contextmanager
def stand(chosen: Settings, folder: Path, candidate: str, rows: int = 0) -> Iterator[Stand]:
    """Bring it up: load the data, build the tables, train a model and register it.

    Args:
        chosen: the settings; `source` says which data.
        folder: temporary; PostgreSQL's user has to be able to enter it.
        candidate: kind of model.
        rows: of generated data instead of the source; 0: the source.

    Raises:
        BenchError, IngestionError, PostgresError, MlflowError: a step failed.
    """
    data = base_file(chosen, folder, rows)
    state = folder / "mlflow-state"
    with running_server(folder) as server:
        server.fresh(_DATABASE)
        mlflow = MlflowServer(state, f"sqlite:///{folder / 'mlflow.db'}")
        try:
            uri = mlflow.start(_MLFLOW_PORT)
            environment = {
                **server.environment(_DATABASE),
                **client_environment(uri),
                "DIABETES_STATE_DIR": str(folder / "training"),
                "DBT_SEND_ANONYMOUS_USAGE_STATS": "False",
                "DO_NOT_TRACK": "1",
            }
            log.info("loading %s rows and building the tables: %s", f"{data.rows:,}", data.origin)
            run([sys.executable, "-m", "bench.child", "ingest", str(data.path)], environment)
            target = folder / "dbt"
            target.mkdir()
            only = ["--exclude-resource-type", "test", "--exclude-resource-type", "unit_test"]
            folders = ["--target-path", str(target), "--log-path", str(target)]
            run(["dbt", "build", *only, *folders], environment, PROJECT)
            mlflow.wait_until_ready()
            log.info("training a model: %s", candidate)
            _point(uri, _train(environment, candidate))
            yield Stand(server, uri, f"{data.rows:,} rows, {data.origin}", folder)
        finally:
            processes.stop(state)


def _train(environment: dict[str, str], candidate: str) -> str:
    command: Sequence[str] = (
        *(sys.executable, "-W", "ignore", "-m", "training", "run", "--no-learning-curve"),
        *("--candidates", candidate, "--trials", "1", "--decided-by", "load test"),
    )
    said = run(command, environment).output
    answer: dict[str, Any] = json.loads(said[said.index("\n{\n") :])
    return str(answer["version"])


def _point(uri: str, version: str) -> None:
    from mlflow import MlflowClient

    MlflowClient(uri).set_registered_model_alias(REGISTERED_MODEL, ALIAS, version)

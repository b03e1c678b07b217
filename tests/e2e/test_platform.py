"""The whole platform, brought up once: raw file, champion, prediction, page, drift.

PostgreSQL, MLflow, four Airflow processes, Cosmos, dbt, the API, the page, Prometheus where it is.
On the real file where it is at hand, else on as many synthetic encounters.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient

from services import processes
from services.observability import (
    ALERTMANAGER,
    POSTGRES_EXPORTER,
    PROMETHEUS,
    STATSD_EXPORTER,
    Prometheus,
    find_tool,
)
from services.web import EXPORTER
from settings import PROJECT_ROOT
from tests.conftest import SHARED_DATA
from tests.local_platform import LocalPlatform
from tests.panels import queries
from tests.served import as_json, synthetic, wait_until

DRIFT = "diabetes_drift_monitoring"

pytestmark = pytest.mark.timeout(1200)


@dataclass(frozen=True, slots=True)
class FirstRun:
    """How the first `make run` on a new state folder ended."""

    code: int
    output: str
    source: str


@pytest.fixture(scope="module")
def platform(reachable_tmp: Path) -> Iterator[LocalPlatform]:
    platform = LocalPlatform(reachable_tmp / "platform")
    yield platform
    platform.run("down")


@pytest.fixture(scope="module")
def first_run(platform: LocalPlatform) -> FirstRun:
    named = os.environ.get("DIABETES_SOURCE", "")
    source = next((path for path in (named, str(SHARED_DATA)) if Path(path).is_file()), "synthetic")
    return FirstRun(*platform.run("run", source=source), source)


def test_raw_file_becomes_a_champion(platform: LocalPlatform, first_run: FirstRun) -> None:
    code, output = first_run.code, first_run.output
    assert code == 0, output
    assert ("SYNTHETIC DATA" in output) == (first_run.source == "synthetic")
    assert "dbt_docs_index.html" in output
    assert re.search(r"search \[lightgbm\] +[\d.]+ s +ok", output)
    assert re.search(r"Champion: diabetes_readmission version \d+, lightgbm; every gate", output)
    assert re.search(r"auroc +0\.6[6-9]\d \[0\.\d+, 0\.\d+\] +0\.6[6-9]\d \[", output)
    (card,) = re.findall(r"Card +(http\S+)", output)
    assert requests.get(card, timeout=30).ok
    ((split_rows, raw_rows),) = platform.rows(
        """select (select count(*) from clean_data.diabetes_train)
            + (select count(*) from clean_data.diabetes_validation)
            + (select count(*) from clean_data.diabetes_test)
            + (select count(*) from clean_data.diabetes_excluded),
            (select count(*) from raw_data.diabetes)"""
    )
    assert split_rows == raw_rows > 100_000
    ((run_id,),) = platform.rows("select run_id from raw_data.ingestion_log")
    assert str(run_id).startswith("manual__")
    assert list((platform.state / "work").iterdir()) == []
    ((action, gates, test),) = platform.rows("select action, gates, test from ml.promotion_log")
    assert action == "promoted"
    assert all(gate["passed"] for gate in gates)  # type: ignore[attr-defined]
    assert test is not None


def test_champion_is_served_and_what_it_is_asked_is_logged(
    platform: LocalPlatform, first_run: FirstRun
) -> None:
    (api, version) = re.findall(r"API +(http\S+)/docs \(serves version (\d+)\)", first_run.output)[
        0
    ]
    said = subprocess.run(
        [str(PROJECT_ROOT / "scripts" / "predict.sh")],
        env={**os.environ, "DIABETES_STATE_DIR": str(platform.state)},
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(said.stdout)
    assert answer["model_version"] == version
    is_synthetic = requests.get(f"{api}/v1/model", timeout=30).json()["is_synthetic"]
    assert is_synthetic == (first_run.source == "synthetic")
    logged = "select probability from inference.predictions where prediction_id = "
    wait_until(lambda: platform.rows(f"{logged}'{answer['prediction_id']}'"))
    assert platform.rows(f"{logged}'{answer['prediction_id']}'") == [(answer["probability"],)]


def test_urls_answer(platform: LocalPlatform, first_run: FirstRun) -> None:
    variables = platform.environment()
    airflow = platform.airflow()
    assets = {asset["name"] for asset in airflow.call("GET", "assets")["assets"]}
    assert assets > {"clean_data.diabetes_train", "models.diabetes_readmission"}
    # Each was published once.
    assert platform.asset_events() == len(assets)
    url = airflow.url
    page = requests.get(f"{url}/cosmos/diabetes/dbt_docs_index.html", timeout=30)
    assert page.ok
    assert "dbt" in page.text
    catalog = requests.get(f"{url}/cosmos/diabetes/catalog.json", timeout=30)
    assert "diabetes_train" in catalog.text
    mlflow = requests.get(variables["MLFLOW_TRACKING_URI"], timeout=30)
    assert "<title>MLflow</title>" in mlflow.text
    api = variables["DIABETES_API_URL"]
    assert requests.get(f"{api}/livez", timeout=30).ok
    assert requests.get(f"{api}/readyz", timeout=30).ok
    assert "Streamlit" in requests.get(variables["DIABETES_UI_URL"], timeout=30).text


def test_metrics_are_told(platform: LocalPlatform, first_run: FirstRun) -> None:
    (exporter,) = processes.environments(platform.state, EXPORTER.name)
    url = f"http://127.0.0.1:{exporter['DIABETES_EXPORTER_PORT']}/metrics"
    wanted = (
        "pipeline_database_up 1.0",
        'pipeline_load_rows{result="inserted"} 1',
        'dbt_results{resource_type="model",status="success"}',
        "pipeline_published_timestamp_seconds",
        "airflow_api_up 1.0",
        'dag_run_success{dag_id="diabetes_data_processing"} 1.0',
        'dag_run_success{dag_id="diabetes_model_training"} 1.0',
    )

    def missing() -> list[str]:
        text = requests.get(url, timeout=5).text
        return [line for line in wanted if line not in text]

    wait_until(lambda: not missing(), 60)


@pytest.mark.skipif(
    not all(find_tool(tool, "") for tool in (PROMETHEUS, ALERTMANAGER, POSTGRES_EXPORTER)),
    reason="not all of Prometheus, Alertmanager and postgres_exporter are on the PATH",
)
def test_prometheus_scrapes_every_service(platform: LocalPlatform, first_run: FirstRun) -> None:
    url = Prometheus(platform.state, Path("prometheus")).url
    expected = {"alertmanager", "api", "mlflow", "pipeline", "postgres", "prometheus"}

    def up() -> set[str]:
        answer = requests.get(f"{url}/api/v1/targets", timeout=5).json()
        targets = answer["data"]["activeTargets"]
        return {target["labels"]["job"] for target in targets if target["health"] == "up"}

    wait_until(lambda: up() >= expected, 60)


@pytest.mark.skipif(
    not all(find_tool(tool, "") for tool in (PROMETHEUS, POSTGRES_EXPORTER)),
    reason="not both of Prometheus and postgres_exporter are on the PATH",
)
def test_drift_is_found_trained_for_and_shown_on_every_panel(
    platform: LocalPlatform, first_run: FirstRun
) -> None:
    variables = platform.environment()
    api = variables["DIABETES_API_URL"]
    encounters = [{**as_json(row), "age": "[90-100)"} for row in synthetic(1500)]
    answer = requests.post(
        f"{api}/v1/predict/batch", json={"encounters": encounters}, timeout=60
    ).json()
    predicted = sum(row["probability"] is not None for row in answer["predictions"])
    assert predicted > 1000
    logged = "select count(*) from inference.predictions"
    wait_until(lambda: platform.rows(logged)[0][0] > predicted, 60)  # type: ignore[operator]
    airflow = platform.airflow()
    run_id = airflow.trigger(DRIFT, {"retrain": True})
    states = {task.task_id: task.state for task in airflow.follow(DRIFT, run_id, 600)}
    assert airflow.run_state(DRIFT, run_id) == "success", states
    assert states["retrain"] == "success"
    drifted = "select enough_rows, drifted_features > 0 from monitoring.drift_checks where "
    assert platform.rows(f"{drifted} check_id = '{run_id}' and window_name = 'predictions'") == [
        (True, True)
    ]
    client = MlflowClient(variables["MLFLOW_TRACKING_URI"])
    (experiment,) = [each for each in client.search_experiments() if "drift" in each.name]
    reports = [
        file.path
        for run in client.search_runs([experiment.experiment_id])
        for file in client.list_artifacts(run.info.run_id)
    ]
    assert any(path.endswith(".html") for path in reports), reports
    # The same data would make the same model: the training is there, and skips itself.
    training = airflow.follow("diabetes_model_training", f"drift__{run_id}", 600)
    assert {task.task_id: task.state for task in training}["prepare"] == "skipped"

    # What nobody gives here: Airflow's own counts, where there is no statsd_exporter.
    missing = frozenset() if find_tool(STATSD_EXPORTER, "") else frozenset({"airflow"})
    url = Prometheus(platform.state, Path("prometheus")).url
    silent = [query for query in queries() if not query.jobs & missing]
    assert len(silent) > 40
    deadline = time.monotonic() + 120
    while silent := [query for query in silent if not results(url, query.expression)]:
        assert time.monotonic() < deadline, silent
        # A rate needs requests between two scrapes, on /v1/predict and beside it.
        for path in ("predict", "explain"):
            requests.post(f"{api}/v1/{path}", json=encounters[0], timeout=30)
        time.sleep(1)


def results(url: str, expression: str) -> list[object]:
    """What Prometheus answers to a query now."""
    answer = requests.get(f"{url}/api/v1/query", params={"query": expression}, timeout=10).json()
    assert answer["status"] == "success", (expression, answer)
    series: list[object] = answer["data"]["result"]
    return series


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on the PATH")
def test_pages_show_in_a_browser(
    platform: LocalPlatform, first_run: FirstRun, tmp_path: Path
) -> None:
    # The script logs in, opens the graph of the last run and the lineage, and waits for both.
    subprocess.run(
        [
            *(sys.executable, str(PROJECT_ROOT / "scripts" / "screenshots.py")),
            *("--out", str(tmp_path), "--load-seconds", "0"),
        ],
        env={**os.environ, "DIABETES_STATE_DIR": str(platform.state)},
        check=True,
    )
    pages = ["airflow-graph", "dbt-lineage", "model-card", "page-encounter", "page-model"]
    for name in pages:
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        # An empty page of this size compresses to a few kilobytes.
        assert len(picture) > 30_000, name


def test_down_stops_everything(platform: LocalPlatform, first_run: FirstRun) -> None:
    url = platform.airflow().url
    code, output = platform.run("down")
    assert code == 0, output
    assert processes.find(platform.state) == []
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=5)

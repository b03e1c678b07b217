"""The whole platform for real: PostgreSQL, MLflow, four Airflow processes, Cosmos, dbt.

One platform serves the module; the tests go through a user's day in the order of the file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest
import requests
from mlflow import MlflowClient

from services import processes
from services.airflow import Airflow
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
from tests.panels import queries
from tests.served import as_json, synthetic

DRIFT = "diabetes_drift_monitoring"

pytestmark = pytest.mark.timeout(1200)


class LocalPlatform:
    """`python -m services` on a state folder of its own."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def command(self, *arguments: str, source: str = "synthetic:2000") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "services", *arguments],
            cwd=PROJECT_ROOT,
            env={
                **os.environ,
                "DIABETES_STATE_DIR": str(self.state),
                "DIABETES_SOURCE": source,
                # One quick candidate: what is looked at here is the way, not the model.
                "DIABETES_TRAINING_CANDIDATES": "lightgbm",
                "DIABETES_TRAINING_TRIALS": "1",
                "DIABETES_DB_PORT": "56200",
                "DIABETES_AIRFLOW_PORT": "56300",
                "DIABETES_MLFLOW_PORT": "56400",
                "DIABETES_API_PORT": "56600",
                "DIABETES_UI_PORT": "56700",
                "MLFLOW_TRACKING_URI": "",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, source: str = "synthetic:2000") -> tuple[int, str]:
        process = self.command(*arguments, source=source)
        output, _ = process.communicate(timeout=900)
        return process.returncode, output

    def environment(self) -> dict[str, str]:
        shell = f". {self.state}/env.sh && env -0"
        said = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
        return dict(entry.split("=", 1) for entry in said.stdout.split("\0") if entry)

    def rows(self, query: str) -> list[tuple[object, ...]]:
        variables = self.environment()
        with (
            closing(
                psycopg2.connect(
                    host="127.0.0.1",
                    port=variables["DIABETES_DB_PORT"],
                    user="diabetes",
                    password=variables["DIABETES_DB_PASSWORD"],
                    dbname="diabetes",
                )
            ) as connection,
            connection,
        ):
            cursor = connection.cursor()
            cursor.execute(query)
            return cursor.fetchall() if cursor.description else []

    def services(self) -> set[int]:
        """Pids of the running services, without their children."""
        parents = {process.pid: process.ppid() for process in processes.find(self.state)}
        return {pid for pid, parent in parents.items() if parent not in parents}

    def contents(self) -> list[tuple[object, ...]]:
        """Batches with their hashes, and the rows of the other tables by hash."""
        return self.rows("select * from clean_data.batch_info order by batch_id") + [
            row
            for table in ("diabetes_validation", "diabetes_test", "diabetes_excluded")
            for row in self.rows(
                f"select '{table}', count(*), md5(string_agg(md5(cast(t as text)), '' "
                f"order by encounter_id)) from clean_data.{table} as t"
            )
        ]


@pytest.fixture(scope="module")
def platform(reachable_tmp: Path) -> Iterator[LocalPlatform]:
    platform = LocalPlatform(reachable_tmp / "platform")
    yield platform
    platform.run("down")


def test_interrupt_while_starting_leaves_nothing_that_down_cannot_stop(
    platform: LocalPlatform,
) -> None:
    for seconds in (0.5, 3, 10):
        process = platform.command("run")
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode != 0
        assert platform.run("down")[0] == 0
        assert processes.find(platform.state) == []


def test_run_brings_synthetic_data_to_clean_data(platform: LocalPlatform) -> None:
    code, output = platform.run("run")
    assert code == 0, output
    assert "SYNTHETIC DATA" in output
    assert re.search(r"train +all +1,\d{3}", output)
    assert "dbt_docs_index.html" in output
    ((split_rows, raw_rows),) = platform.rows(
        """select (select count(*) from clean_data.diabetes_train)
            + (select count(*) from clean_data.diabetes_validation)
            + (select count(*) from clean_data.diabetes_test)
            + (select count(*) from clean_data.diabetes_excluded),
            (select count(*) from raw_data.diabetes)"""
    )
    assert split_rows == raw_rows == 2000
    ((source, synthetic, run_id),) = platform.rows(
        "select source, is_synthetic, run_id from raw_data.ingestion_log"
    )
    assert (source, synthetic) == ("synthetic:2000", True)
    assert str(run_id).startswith("manual__")
    assert list((platform.state / "work").iterdir()) == []
    # Three hundred validation rows make no champion, and that is said.
    assert re.search(r"search \[lightgbm\] +[\d.]+ s +ok", output)
    assert "diabetes_readmission has no champion: gates not passed" in output
    assert re.search(r"API +http\S+/docs \(waits for a champion\)", output)


def test_urls_answer(platform: LocalPlatform) -> None:
    variables = platform.environment()
    url = variables["AIRFLOW__API__BASE_URL"]
    password = json.loads((platform.state / "secrets.json").read_text())["admin"]
    token = requests.post(
        f"{url}/auth/token", json={"username": "admin", "password": password}, timeout=30
    ).json()["access_token"]
    login = {"Authorization": f"Bearer {token}"}
    assets = requests.get(f"{url}/api/v2/assets", headers=login, timeout=30).json()["assets"]
    assert "clean_data.diabetes_train" in {asset["name"] for asset in assets}
    events = requests.get(f"{url}/api/v2/assets/events", headers=login, timeout=30).json()
    assert events["total_entries"] == len(assets)
    page = requests.get(f"{url}/cosmos/diabetes/dbt_docs_index.html", timeout=30)
    assert page.ok
    assert "dbt" in page.text
    catalog = requests.get(f"{url}/cosmos/diabetes/catalog.json", timeout=30)
    assert "diabetes_train" in catalog.text
    mlflow = requests.get(variables["MLFLOW_TRACKING_URI"], timeout=30)
    assert "<title>MLflow</title>" in mlflow.text
    api = variables["DIABETES_API_URL"]
    assert requests.get(f"{api}/livez", timeout=30).ok
    unready = requests.get(f"{api}/readyz", timeout=30)
    assert (unready.status_code, "alias champion" in unready.text) == (503, True)
    assert "Streamlit" in requests.get(variables["DIABETES_UI_URL"], timeout=30).text


def test_metrics_are_told(platform: LocalPlatform) -> None:
    (exporter,) = processes.environments(platform.state, EXPORTER.name)
    url = f"http://127.0.0.1:{exporter['DIABETES_EXPORTER_PORT']}/metrics"
    wanted = (
        "pipeline_database_up 1.0",
        'pipeline_load_rows{result="inserted"} 2000.0',
        'dbt_results{resource_type="model",status="success"}',
        "pipeline_published_timestamp_seconds",
        "airflow_api_up 1.0",
        'dag_run_success{dag_id="diabetes_data_processing"} 1.0',
        'dag_run_success{dag_id="diabetes_model_training"} 1.0',
    )
    deadline = time.monotonic() + 30
    while missing := [line for line in wanted if line not in requests.get(url, timeout=5).text]:
        assert time.monotonic() < deadline, missing
        time.sleep(1)


@pytest.mark.skipif(
    not all(find_tool(tool, "") for tool in (PROMETHEUS, ALERTMANAGER, POSTGRES_EXPORTER)),
    reason="not all of Prometheus, Alertmanager and postgres_exporter are on the PATH",
)
def test_prometheus_scrapes_every_service(platform: LocalPlatform) -> None:
    url = Prometheus(platform.state, Path("prometheus")).url
    expected = {"alertmanager", "api", "mlflow", "pipeline", "postgres", "prometheus"}
    deadline = time.monotonic() + 30
    while True:
        found = requests.get(f"{url}/api/v1/targets", timeout=5).json()["data"]["activeTargets"]
        up = {target["labels"]["job"] for target in found if target["health"] == "up"}
        if up >= expected:
            break
        assert time.monotonic() < deadline, up
        time.sleep(1)


def test_dbt_works_by_hand(platform: LocalPlatform, tmp_path: Path) -> None:
    before = platform.contents()
    for command in (["build"], ["test"], ["docs", "generate"], ["source", "freshness"]):
        subprocess.run(
            [
                "dbt",
                "--quiet",
                "--log-path",
                str(tmp_path),
                *command,
                "--target-path",
                str(tmp_path),
            ],
            cwd=PROJECT_ROOT / "dbt_diabetes",
            env=platform.environment(),
            check=True,
        )
    assert platform.contents() == before


def test_second_run_changes_nothing(platform: LocalPlatform) -> None:
    before = platform.contents()
    services = platform.services()
    assert len(services) >= 8
    code, output = platform.run("run")
    assert code == 0, output
    assert "0 new, 0 changed, 2,000 unchanged" in output
    assert platform.contents() == before
    assert re.search(r"prepare +[\d.]+ s +SKIPPED", output)
    assert platform.services() == services  # none was started again


def test_added_load_fills_the_last_batch_and_leaves_the_splits(platform: LocalPlatform) -> None:
    splits = "select encounter_id, split from intermediate.int_encounters__features"
    before = dict(platform.rows(splits))
    code, output = platform.run("run", source="synthetic:2500")
    assert code == 0, output
    assert "500 new, 0 changed, 2,000 unchanged" in output
    after = dict(platform.rows(splits))
    assert before.items() <= after.items()
    assert len(after) == 2500


def test_broken_file_fails_the_run_with_its_reason(platform: LocalPlatform, tmp_path: Path) -> None:
    before = platform.contents()
    broken = tmp_path / "broken.csv"
    broken.write_text("encounter_id,patient_nbr\n1,2\n")
    code, output = platform.run("run", source=str(broken))
    assert code == 1
    assert "ingest.validate failed" in output
    assert "wrong header" in output
    assert platform.contents() == before
    assert list((platform.state / "work").iterdir()) == []


def test_failing_dbt_test_publishes_nothing(platform: LocalPlatform) -> None:
    before = platform.contents()
    assets = asset_events(platform)
    platform.rows(
        """create temp table broken as select * from raw_data.diabetes limit 1;
        update broken set encounter_id = 9999999999, max_glu_serum = 'bogus';
        insert into raw_data.diabetes select * from broken"""
    )
    code, output = platform.run("run", source="synthetic:2500")
    assert code == 1, output
    assert re.search(r"transform\.\w+\.test +[\d.]+ s +FAILED", output)
    assert platform.contents() == before
    assert asset_events(platform) == assets
    platform.rows("delete from raw_data.diabetes where encounter_id = 9999999999")


def asset_events(platform: LocalPlatform) -> int:
    with closing(
        psycopg2.connect(
            platform.environment()["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"].replace("+psycopg2", "")
        )
    ) as connection:
        cursor = connection.cursor()
        cursor.execute("select count(*) from asset_event")
        (count,) = cursor.fetchone() or (0,)
        return int(count)


def test_run_brings_the_real_file_to_a_champion(platform: LocalPlatform, real_zip: Path) -> None:
    assets = asset_events(platform)
    code, output = platform.run("run", source=str(real_zip))
    assert code == 0, output
    assert asset_events(platform) > assets
    assert "The synthetic encounters of an earlier run will be replaced." in output
    assert re.search(r"Champion: diabetes_readmission version \d+, lightgbm; every gate", output)
    assert re.search(r"auroc +0\.6[67]\d \[0\.\d+, 0\.\d+\] +0\.6[678]\d \[", output)
    (card,) = re.findall(r"Card +(http\S+)", output)
    assert requests.get(card, timeout=30).ok
    ((action, gates, test),) = platform.rows(
        "select action, gates, test from ml.promotion_log order by decision_id desc limit 1"
    )
    assert action == "promoted"
    assert all(gate["passed"] for gate in gates)  # type: ignore[attr-defined]
    assert test is not None
    # The service found the champion by itself, and what it is asked is logged.
    (api, version) = re.findall(r"API +(http\S+)/docs \(serves version (\d+)\)", output)[0]
    said = subprocess.run(
        [str(PROJECT_ROOT / "scripts" / "predict.sh")],
        env={**os.environ, "DIABETES_STATE_DIR": str(platform.state)},
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(said.stdout)
    assert answer["model_version"] == version
    assert requests.get(f"{api}/v1/model", timeout=30).json()["is_synthetic"] is False
    logged = "select probability from inference.predictions where prediction_id = "
    deadline = time.monotonic() + 30
    while not (rows := platform.rows(f"{logged}'{answer['prediction_id']}'")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert rows == [(answer["probability"],)]


@pytest.mark.skipif(
    not all(find_tool(tool, "") for tool in (PROMETHEUS, POSTGRES_EXPORTER)),
    reason="not both of Prometheus and postgres_exporter are on the PATH",
)
def test_drift_is_checked_and_every_panel_has_data(platform: LocalPlatform) -> None:
    variables = platform.environment()
    api = variables["DIABETES_API_URL"]
    encounters = [as_json(row) for row in synthetic(1500)]
    batch = {"encounters": encounters}
    assert requests.post(f"{api}/v1/predict/batch", json=batch, timeout=60).ok
    password = json.loads((platform.state / "secrets.json").read_text())["admin"]
    airflow = Airflow(platform.state, variables, password)
    deadline = time.monotonic() + 30
    while platform.rows("select count(*) from inference.predictions")[0][0] < 1000:  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.5)
    run_id = airflow.trigger("diabetes_drift_monitoring", {})
    states = {task.task_id: task.state for task in airflow.follow(DRIFT, run_id, 300)}
    assert airflow.run_state(DRIFT, run_id) == "success", states
    assert states["retrain"] == "skipped"
    windows = dict(platform.rows("select window_name, enough_rows from monitoring.drift_checks"))
    assert windows == {"predictions": True, "load": True}
    (experiment,) = [
        found
        for found in MlflowClient(variables["MLFLOW_TRACKING_URI"]).search_experiments()
        if "drift" in found.name
    ]
    client = MlflowClient(variables["MLFLOW_TRACKING_URI"])
    reports = [
        file.path
        for run in client.search_runs([experiment.experiment_id])
        for file in client.list_artifacts(run.info.run_id)
    ]
    assert any(path.endswith(".html") for path in reports), reports
    # What nobody gives here: Airflow's own counts, where there is no statsd_exporter.
    missing = frozenset() if find_tool(STATSD_EXPORTER, "") else frozenset({"airflow"})
    url = Prometheus(platform.state, Path("prometheus")).url
    silent = [query for query in queries() if not query.jobs & missing]
    assert len(silent) > 40
    deadline = time.monotonic() + 90
    while silent := [query for query in silent if not answer(url, query.expression)]:
        assert time.monotonic() < deadline, silent
        # A rate needs requests between two scrapes, on /v1/predict and beside it.
        for path in ("predict", "explain"):
            requests.post(f"{api}/v1/{path}", json=encounters[0], timeout=30)
        time.sleep(2)


def test_drift_starts_a_training_where_it_is_to(platform: LocalPlatform) -> None:
    variables = platform.environment()
    older = [{**as_json(row), "age": "[90-100)"} for row in synthetic(1500, seed=8)]
    api = variables["DIABETES_API_URL"]
    ((before,),) = platform.rows("select count(*) from inference.predictions")
    assert requests.post(f"{api}/v1/predict/batch", json={"encounters": older}, timeout=60).ok
    logged = "select count(*) from inference.predictions"
    deadline = time.monotonic() + 30
    while platform.rows(logged)[0][0] < int(str(before)) + 1000:  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.5)
    password = json.loads((platform.state / "secrets.json").read_text())["admin"]
    airflow = Airflow(platform.state, variables, password)
    run_id = airflow.trigger(DRIFT, {"retrain": True})
    # Not to the end of the run: the report is drawn beside it.
    ended = (
        task.state
        for task in airflow.follow(DRIFT, run_id, 300)
        if task.task_id == "retrain" and task.state != "running"
    )
    assert next(ended) == "success"
    # The same data would make the same model: the run is there, and skips itself.
    training = "diabetes_model_training"
    started = airflow.follow(training, f"drift__{run_id}", 300)
    assert {task.task_id: task.state for task in started}["prepare"] == "skipped"


def answer(url: str, expression: str) -> list[object]:
    """What Prometheus answers to a query now."""
    given = requests.get(f"{url}/api/v1/query", params={"query": expression}, timeout=10).json()
    assert given["status"] == "success", (expression, given)
    found: list[object] = given["data"]["result"]
    return found


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on the PATH")
def test_pages_show_in_a_browser(platform: LocalPlatform, tmp_path: Path) -> None:
    # The script logs in, opens the graph of the last run and the lineage, and waits for both.
    subprocess.run(
        [
            *(sys.executable, str(PROJECT_ROOT / "scripts" / "screenshots.py")),
            *("--out", str(tmp_path), "--load-seconds", "18"),
        ],
        env={**os.environ, "DIABETES_STATE_DIR": str(platform.state)},
        check=True,
    )
    pages = ["airflow-graph", "dbt-lineage", "model-card", "page-encounter", "page-model"]
    for name in [*pages, "load-locust"]:
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        # An empty page of this size compresses to a few kilobytes.
        assert len(picture) > 30_000, name


def test_missing_source_is_one_clear_message(platform: LocalPlatform) -> None:
    code, output = platform.run("run", source="/no/such/file.zip")
    assert code == 1
    assert output.strip().splitlines()[-1].startswith("error: /no/such/file.zip: no such file")


def test_down_stops_everything_and_can_be_repeated(platform: LocalPlatform) -> None:
    url = platform.environment()["AIRFLOW__API__BASE_URL"]
    for _ in range(2):
        assert platform.run("down")[0] == 0
        assert processes.find(platform.state) == []
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=5)

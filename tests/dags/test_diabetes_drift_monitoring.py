"""The DAG of drift as Airflow makes it: when it runs, in which order, and that it only looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from settings import CLEAN_DATA, PROJECT_ROOT

DAG_ID = "diabetes_drift_monitoring"
DBT = "compare."
MODELS = {"int_drift__values", "int_drift__bins", "drift", "calibration", "drift_checks"}


@pytest.fixture(scope="module")
def dag(described: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = described["dags"][DAG_ID]
    return found


@pytest.fixture(scope="module")
def tasks(dag: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = dag["tasks"]
    return found


def upstream(tasks: dict[str, dict[str, Any]], task_id: str) -> set[str]:
    found: set[str] = set()
    queue = [task_id]
    while queue:
        for parent in set(tasks[queue.pop()]["upstream"]) - found:
            found.add(parent)
            queue.append(parent)
    return found


def test_it_runs_each_night_and_after_each_load(dag: dict[str, Any]) -> None:
    assert dag["schedule"] == ["AssetAll", *sorted(f"clean_data.{name}" for name in CLEAN_DATA)]
    assert dag["cron"] == "30 3 * * *"
    assert dag["catchup"] is False
    assert dag["max_active_runs"] == 1
    assert dag["doc_md"] == (PROJECT_ROOT / "docs" / "drift.md").read_text("utf-8")


def test_by_default_a_day_is_looked_at_and_nothing_is_trained(dag: dict[str, Any]) -> None:
    params = dag["params"]
    assert {name: each["default"] for name, each in params.items()} == {
        "hours": 24,
        "outcome_days": 90,
        "retrain": False,
    }
    for name in ("hours", "outcome_days"):
        assert params[name]["schema"]["minimum"] == 1
    assert params["retrain"]["schema"]["type"] == "boolean"
    assert all(each["title"] and each["description"] for each in params.values())


def test_tasks_run_in_order(tasks: dict[str, dict[str, Any]]) -> None:
    assert {name for name in tasks if not name.startswith(DBT)} == {
        "prepare", "report", "decide", "retrain",
    }  # fmt: skip
    assert tasks["prepare"]["upstream"] == []
    assert "prepare" in tasks[f"{DBT}dbt_producer_watcher"]["upstream"]
    assert tasks["retrain"]["upstream"] == ["decide"]
    assert tasks["decide"]["type"] == "_ShortCircuitDecoratedOperator"
    assert tasks["retrain"]["type"] == "TriggerDagRunOperator"
    assert tasks["retrain"]["triggers"] == "diabetes_model_training"
    # A check that is repeated asks for no second training.
    assert tasks["retrain"]["triggered_run"] == "drift__{{ run_id }}"
    # A report that MLflow does not take keeps nobody from deciding.
    assert "report" not in upstream(tasks, "decide")


def test_it_builds_the_models_of_drift_and_no_other(
    tasks: dict[str, dict[str, Any]], manifest: Path
) -> None:
    nodes = {tasks[name]["node"] for name in upstream(tasks, "decide") if tasks[name]["node"]}
    assert {name.split(".")[-1] for name in nodes if name.startswith("model.")} == MODELS
    assert not [name for name in nodes if name.startswith("seed.")]
    producer = tasks[f"{DBT}dbt_producer_watcher"]
    assert producer["vars"] == {"drift_limit": 0.2}
    watched = producer["watched_tests"]
    tests = {
        name
        for name, node in json.loads(manifest.read_text())["nodes"].items()
        if name.startswith("test.") and "models/monitoring" in node["original_file_path"]
    }
    assert {test for each in watched.values() for test in each} == tests
    assert upstream(tasks, "report") == upstream(tasks, "decide")


def test_every_task_has_a_timeout_and_what_can_pass_is_retried(
    tasks: dict[str, dict[str, Any]],
) -> None:
    assert all(task["timeout"] for task in tasks.values())
    retried = {name for name, task in tasks.items() if task["retries"]}
    assert retried == {"prepare", "report", "decide"}


def test_parsing_imports_nothing_heavy(described: dict[str, Any]) -> None:
    heavy = {"evidently", "mlflow", "pandas", "monitoring.report", "monitoring.drift"}
    assert heavy & set(described["modules"]) == set()

"""The DAG as Airflow and Cosmos make it from the file and dbt's manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from settings import PROJECT_ROOT
from tests.dags.conftest import describe

DAG_ID = "diabetes_data_processing"
DBT = "transform."


@pytest.fixture(scope="session")
def dag(described: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = described["dags"][DAG_ID]
    return found


@pytest.fixture(scope="session")
def tasks(dag: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = dag["tasks"]
    return found


def ancestors(tasks: dict[str, dict[str, Any]], task_id: str) -> set[str]:
    found: set[str] = set()
    queue = [task_id]
    while queue:
        for parent in tasks[queue.pop()]["upstream"]:
            if parent not in found:
                found.add(parent)
                queue.append(parent)
    return found


def test_folder_holds_exactly_these_dags(described: dict[str, Any]) -> None:
    # A missing folder, or a file without the words "airflow" and "dag", gives no error either.
    assert described["errors"] == {}
    assert set(described["dags"]) == {path.stem for path in (PROJECT_ROOT / "dags").glob("*.py")}
    assert DAG_ID in described["dags"]


def test_missing_manifest_is_an_import_error(tmp_path: Path) -> None:
    found = describe(PROJECT_ROOT / "dags", tmp_path / "manifest.json", tmp_path)
    assert "manifest.json" in str(found["errors"])


def test_broken_dag_file_is_an_import_error(manifest: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dags"
    shutil.copytree(PROJECT_ROOT / "dags", folder)
    file = folder / f"{DAG_ID}.py"
    file.write_text(file.read_text().replace("DbtTaskGroup(", "NoSuchTaskGroup("))
    assert describe(folder, manifest, tmp_path)["errors"]


def test_run_settings(dag: dict[str, Any]) -> None:
    assert dag["max_active_runs"] == 1
    assert "clean_data" in dag["doc_md"]


def test_params_are_described(dag: dict[str, Any]) -> None:
    assert set(dag["params"]) == {"source", "reject_limit_percent", "full_refresh"}
    for param in dag["params"].values():
        assert param["title"]
        assert param["description"]


def test_ingestion_runs_in_order(tasks: dict[str, dict[str, Any]]) -> None:
    assert tasks["ingest.download"]["upstream"] == ["ingest.prepare"]
    assert tasks["ingest.validate"]["upstream"] == ["ingest.download"]
    assert tasks["ingest.load"]["upstream"] == ["ingest.validate"]
    assert tasks["ingest.clean_up"]["teardown"]
    assert "ingest.load" in tasks["ingest.clean_up"]["upstream"]


def test_every_task_has_a_timeout(tasks: dict[str, dict[str, Any]]) -> None:
    assert [name for name, task in tasks.items() if not task["timeout"]] == []


def test_only_what_can_pass_by_itself_is_retried(tasks: dict[str, dict[str, Any]]) -> None:
    retried = {name for name, task in tasks.items() if task["retries"]}
    assert retried == {"ingest.download", "ingest.load"}
    assert all(tasks[name]["exponential"] for name in retried)


def nodes_of_data(manifest: Path) -> dict[str, Any]:
    """All of dbt's nodes but those of drift, which are another DAG's."""
    nodes = json.loads(manifest.read_text())["nodes"]
    return {
        name: node
        for name, node in nodes.items()
        if not node["original_file_path"].startswith("models/monitoring/")
    }


def test_every_dbt_node_is_a_task_before_publish(
    tasks: dict[str, dict[str, Any]], manifest: Path
) -> None:
    nodes = nodes_of_data(manifest)
    built = {name for name in nodes if name.startswith(("model.", "seed."))}
    before = ancestors(tasks, "publish")
    assert built == {tasks[name]["node"] for name in before if tasks[name]["node"] in built}


def test_every_dbt_test_is_watched_by_a_task_before_publish(
    tasks: dict[str, dict[str, Any]], manifest: Path
) -> None:
    # After a killed producer is cleared, its consumers decide alone: none may be forgotten.
    nodes = nodes_of_data(manifest)
    expected = {name for name in nodes if name.startswith("test.")}
    before = ancestors(tasks, "publish")
    attached = tasks[f"{DBT}dbt_producer_watcher"]["watched_tests"]
    tested = {tasks[name]["node"] for name in before if name.endswith("test")}
    watched = {test for node, tests in attached.items() if node in tested for test in tests}
    assert watched == expected


def test_each_clean_data_table_is_an_asset(
    tasks: dict[str, dict[str, Any]], manifest: Path
) -> None:
    nodes = json.loads(manifest.read_text())["nodes"].values()
    tables = {f"clean_data.{node['name']}" for node in nodes if node["schema"] == "clean_data"}
    assert set(tasks["publish"]["outlets"]) == tables
    assert all(not task["outlets"] for name, task in tasks.items() if name != "publish")

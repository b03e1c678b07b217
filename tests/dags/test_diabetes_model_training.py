"""The training DAG as Airflow makes it: when it starts, what it asks, in which order it works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from settings import CLEAN_DATA, PROJECT_ROOT, settings
from tests.dags.conftest import describe
from training import candidates

DAG_ID = "diabetes_model_training"


@pytest.fixture(scope="module")
def dag(described: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = described["dags"][DAG_ID]
    return found


@pytest.fixture(scope="module")
def tasks(dag: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = dag["tasks"]
    return found


def test_it_starts_when_all_of_clean_data_is_new(dag: dict[str, Any]) -> None:
    joined, *assets = dag["schedule"]
    assert joined == "AssetAll"
    assert assets == sorted(f"clean_data.{table}" for table in CLEAN_DATA)
    assert len(assets) == 6


def test_what_it_waits_for_is_what_the_other_dag_publishes(
    dag: dict[str, Any], described: dict[str, Any]
) -> None:
    publish = described["dags"]["diabetes_data_processing"]["tasks"]["publish"]
    assert sorted(publish["outlets"]) == dag["schedule"][1:]


def test_run_settings(dag: dict[str, Any]) -> None:
    assert dag["max_active_runs"] == 1
    assert dag["doc_md"] == (PROJECT_ROOT / "docs" / "experiments.md").read_text("utf-8")


def test_params_have_the_settings_as_defaults(dag: dict[str, Any]) -> None:
    assert {name: param["default"] for name, param in dag["params"].items()} == {
        "candidates": candidates.names(),
        "trials": settings().training_trials,
        "batches": 0,
        "seed": settings().training_seed,
        "classes": 2,
        "learning_curve": True,
        "force": False,
        "leak_overridden_by": None,
    }
    assert all(param["title"] for param in dag["params"].values())


def test_params_refuse_what_training_would(dag: dict[str, Any]) -> None:
    schemas = {name: param["schema"] for name, param in dag["params"].items()}
    assert schemas["candidates"]["items"] == {"enum": candidates.names()}
    assert schemas["candidates"]["minItems"] == 1
    assert schemas["candidates"]["uniqueItems"] is True
    assert schemas["classes"]["enum"] == [2, 3]
    least = {name: schema.get("minimum") for name, schema in schemas.items()}
    assert (least["trials"], least["batches"], least["seed"]) == (1, 0, 0)
    types = {name: schema.get("type") for name, schema in schemas.items()}
    assert types["force"] == types["learning_curve"] == "boolean"
    assert types["leak_overridden_by"] == ["null", "string"]


def test_candidates_can_be_chosen_by_a_setting(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIABETES_TRAINING_CANDIDATES", "lightgbm,xgboost")
    monkeypatch.setenv("DIABETES_TRAINING_TRIALS", "7")
    found = describe(only_this_dag(tmp_path), manifest, tmp_path)["dags"][DAG_ID]["params"]
    assert found["candidates"]["default"] == ["lightgbm", "xgboost"]
    assert found["candidates"]["schema"]["items"] == {"enum": candidates.names()}
    assert found["trials"]["default"] == 7


def test_tasks_run_in_order(tasks: dict[str, dict[str, Any]]) -> None:
    assert {name: set(task["upstream"]) for name, task in tasks.items()} == {
        "prepare": set(),
        "candidates": {"prepare"},
        "search": {"prepare", "candidates"},
        "choose": {"search"},
        "learning_curve": {"prepare", "choose"},
        "judge": {"prepare", "choose", "learning_curve"},
        "close": {"prepare", "judge"},
    }


def test_candidates_are_searched_one_at_a_time(tasks: dict[str, dict[str, Any]]) -> None:
    assert {name: task["mapped_over"] for name, task in tasks.items() if task["mapped_over"]} == {
        "search": ["candidate"]
    }
    assert tasks["search"]["at_once"] == 1


def test_parent_run_is_closed_whatever_happens(tasks: dict[str, dict[str, Any]]) -> None:
    assert [name for name, task in tasks.items() if task["teardown"]] == ["close"]
    assert [name for name, task in tasks.items() if task["setup"]] == ["prepare"]


def test_new_version_is_an_asset(tasks: dict[str, dict[str, Any]]) -> None:
    outlets = {name: task["outlets"] for name, task in tasks.items() if task["outlets"]}
    assert outlets == {"judge": ["models.diabetes_readmission"]}


def test_every_task_has_a_timeout_and_is_retried(tasks: dict[str, dict[str, Any]]) -> None:
    # Bad input fails at once all the same: training.tasks tells it from a lost server.
    assert all(task["timeout"] and task["retries"] for task in tasks.values())


def only_this_dag(folder: Path) -> Path:
    (folder / "dags").mkdir()
    file = f"{DAG_ID}.py"
    (folder / "dags" / file).write_text((PROJECT_ROOT / "dags" / file).read_text("utf-8"))
    return folder / "dags"


def test_parsing_imports_nothing_heavy(described: dict[str, Any]) -> None:
    heavy = {
        "mlflow", "sklearn", "pandas", "lightgbm", "xgboost", "catboost", "optuna", "matplotlib",
        "sqlglot", "training",
    }  # fmt: skip
    assert heavy & set(described["modules"]) == set()

"""What each image copies, started as its service without building it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from services import web
from services.processes import free_port
from settings import PROJECT_ROOT
from tests.manifests.test_images import (
    BIN,
    CATBOOST,
    CUTTER,
    IMAGES,
    command,
    dockerfile,
    imported,
    instructions,
    run_in,
    tree,
    variables,
)

DESCRIBE = PROJECT_ROOT / "tests" / "dags" / "describe.py"


# --- what is copied is what is imported ------------------------------------------------------


@pytest.fixture(scope="session")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {image: tree(image, tmp_path_factory.mktemp(image)) for image in IMAGES}


@pytest.mark.parametrize(
    ("image", "module"),
    [
        ("api", "serving"),
        ("api", "monitoring"),
        ("mlflow", "infra.jobs.init_storage"),
        ("mlflow", "infra.jobs.migrate"),
        ("mlflow", "infra.jobs.mlflow_users"),
        ("mlflow", "infra.jobs.backup"),
        ("mlflow", "infra.jobs.restore"),
        ("mlflow", "infra.jobs.smoke_test"),
        ("mlflow", "mlflow"),
    ],
)
def test_module_starts(image: str, module: str, trees: dict[str, Path]) -> None:
    done = run_in(image, trees[image], "-m", module, "--help")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "usage" in done.stdout.lower()


@pytest.mark.parametrize(
    ("image", "health", "setting"),
    [
        ("api", "/livez", "DIABETES_API_PORT"),
        ("ui", "/_stcore/health", "DIABETES_UI_PORT"),
    ],
)
def test_service_answers_and_ends_when_told_to(
    image: str, health: str, setting: str, trees: dict[str, Path], tmp_path: Path
) -> None:
    (started,) = [rest for word, rest in instructions(dockerfile(image)) if word == "CMD"]
    python, *arguments = json.loads(started)
    assert python == "python"
    port = free_port(58000 + os.getpid() % 1000)
    given = {
        setting: str(port),
        "DIABETES_STATE_DIR": str(tmp_path / "state"),
        "DIABETES_PREDICTION_LOG_KEY": "only for tests",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    }
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(image, *arguments),
            cwd=trees[image],
            env=variables(trees[image], **given),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 60
        while not web.answers(f"http://127.0.0.1:{port}{health}"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        process.terminate()
        assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("image", "without", "missing"),
    [
        ("api", "ingestion/contract.py", "ingestion.contract"),
        ("api", "training/inference.py", "training.inference"),
        ("api", "monitoring/exporter.py", "monitoring.exporter"),
        ("airflow", "monitoring/report.py", "monitoring.report"),
        ("ui", "settings", "settings"),
        ("mlflow", "infra/jobs", "infra.jobs"),
        ("airflow", "ingestion", "ingestion"),
    ],
)
def test_a_file_that_is_not_copied_is_missed(
    image: str, without: str, missing: str, tmp_path: Path
) -> None:
    done = run_in(image, tree(image, tmp_path / "tree", without), "-c", imported(image))
    assert done.returncode == 1
    assert missing in done.stderr


def test_a_package_that_is_not_installed_is_missed(trees: dict[str, Path]) -> None:
    done = run_in("ui", trees["ui"], "-c", "import fastapi")
    assert "No module named 'fastapi'" in done.stderr


def test_dags_come_up_from_what_the_airflow_image_holds(
    trees: dict[str, Path], tmp_path: Path
) -> None:
    folder = trees["airflow"]
    (parse,) = [rest for word, rest in instructions(dockerfile("airflow")) if " parse " in rest]
    # The build has no database and no settings: neither has this.
    words = shlex.split(parse.split("&&")[1])
    begin = words.index("dbt")
    built = [word.replace("/build/dbt", str(tmp_path / "dbt")) for word in words[begin + 1 :]]
    done = subprocess.run(
        [BIN / "dbt", *built],
        cwd=folder / "dbt_diabetes",
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = folder / "dbt_diabetes" / "target" / "manifest.json"
    manifest.parent.mkdir(exist_ok=True)
    shutil.copy(tmp_path / "dbt" / "manifest.json", manifest)
    assert f"DIABETES_DBT_MANIFEST=/opt/platform/{manifest.relative_to(folder)}" in (
        dockerfile("airflow")
    )
    described = run_in(
        "airflow",
        folder,
        "-c",
        f"import runpy; runpy.run_path({str(DESCRIBE)!r}, run_name='__main__')",
        str(folder / "dags"),
        AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=f"sqlite:///{tmp_path}/airflow.db",
        AIRFLOW_CONN_POSTGRES_DEFAULT="postgres://user:password@127.0.0.1:1/db",
    )
    assert described.returncode == 0, described.stderr[-3000:]
    found = json.loads(described.stdout.splitlines()[-1])
    assert found["errors"] == {}
    assert set(found["dags"]) == {
        "diabetes_data_processing",
        "diabetes_drift_monitoring",
        "diabetes_model_training",
    }
    assert all(dag["doc_md"] for dag in found["dags"].values())
    assert "transform.diabetes_train.run" in found["dags"]["diabetes_data_processing"]["tasks"]


# --- CatBoost without the GPU's code ---------------------------------------------------------


@pytest.fixture(scope="session")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of CatBoost whose library has been cut."""
    folder = tmp_path_factory.mktemp("cut")
    made = folder / "catboost"
    shutil.copytree(CATBOOST, made, ignore=shutil.ignore_patterns("__pycache__", "widget", "tests"))
    assert CUTTER.main([str(made / "_catboost.so")]) == 0
    return folder


# --- size ------------------------------------------------------------------------------------

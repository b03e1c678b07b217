"""The DAG folder, described once a session by a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services import dbt
from settings import PROJECT_ROOT


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    dbt.write_manifest(folder, {})
    return folder / "manifest.json"


def describe(folder: Path, manifest: Path, home: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("describe.py")), str(folder)],
        env={
            **os.environ,
            "PYTHONPATH": str(PROJECT_ROOT),
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
            "AIRFLOW_CONN_POSTGRES_DEFAULT": "postgres://user:password@127.0.0.1:1/db",
            "DIABETES_DBT_MANIFEST": str(manifest),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    described: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return described


@pytest.fixture(scope="session")
def described(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return describe(PROJECT_ROOT / "dags", manifest, tmp_path_factory.mktemp("airflow"))

"""`python -m services`, which `make run` calls, on a state folder and ports of the tests' own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psycopg2

from services import processes
from services.airflow import Airflow
from settings import PROJECT_ROOT


class LocalPlatform:
    """`python -m services` on a state folder of its own."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def command(self, *arguments: str, source: str) -> subprocess.Popen[str]:
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
        """Exit code and output of a command; one that hangs is ended after a quarter of an hour."""
        process = self.command(*arguments, source=source)
        output, _ = process.communicate(timeout=900)
        return process.returncode, output

    def environment(self) -> dict[str, str]:
        shell = f". {self.state}/env.sh && env -0"
        printed = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
        return dict(entry.split("=", 1) for entry in printed.stdout.split("\0") if entry)

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

    def airflow(self) -> Airflow:
        """Its Airflow's REST API."""
        password = json.loads((self.state / "secrets.json").read_text())["admin"]
        return Airflow(self.state, self.environment(), password)

    def asset_events(self) -> int:
        """How often something was published."""
        return int(self.airflow().call("GET", "assets/events")["total_entries"])

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

"""One run of Locust against a service that answers, and what came of it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from loadtest import data
from settings import PROJECT_ROOT

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
SCENARIOS = {"single": "Single", "batch": "Batch", "explain": "Explain", "page": "Page"}
SUMMARY = "summary.json"
_LOCUSTS = ("LOCUST_", "LOAD_")


class LoadTestError(Exception):
    """The test could not be run; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What a run has to reach.

    Attributes:
        least_rps: requests per second.
        most_p95_ms: milliseconds within which 95 % are answered.
        most_failures: requests that may fail.
    """

    least_rps: float = 250
    most_p95_ms: float = 150
    most_failures: int = 0

    @property
    def options(self) -> list[str]:
        """For Locust's command line."""
        return [
            f"--least-rps={self.least_rps}",
            f"--most-p95-ms={self.most_p95_ms}",
            f"--most-failures={self.most_failures}",
        ]


# Beside that of single predictions: about half the requests/s and twice the p95 of the slowest
# machine that docs/load/results.md was measured on.
OBJECTIVES = {
    "single": Objective(),
    # A reason is the work of many predictions (TreeSHAP of CatBoost: 6.5 ms of a core).
    "explain": Objective(least_rps=40, most_p95_ms=500),
    # Fifty encounters a request, in worker processes.
    "batch": Objective(least_rps=50, most_p95_ms=400),
    # Mostly reasons; a CSV and the model's card are among the rest.
    "page": Objective(least_rps=50, most_p95_ms=600),
}


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the service.

    Attributes:
        url: of the service.
        scenario: a key of SCENARIOS.
        shape: one of the locustfile's SHAPES.
        users: at most, at once.
        seconds: the test takes.
        key: for services that ask for one.
        more: further options of the locustfile.
        seed: of the encounters.
        rate: requests per second that all users ask for together; 0: each as soon as it can.
    """

    url: str
    scenario: str = "single"
    shape: str = "steady"
    users: int = 16
    seconds: float = 60
    key: str = ""
    more: Sequence[str] = field(default=())
    seed: int = data.SEED
    rate: float = 0


def check(url: str) -> str:
    """The version that the service serves.

    Raises:
        LoadTestError: it does not answer, or has no model.
    """
    session = requests.Session()
    session.trust_env = False  # a proxy has no business between a load test and its service
    try:
        answer = session.get(f"{url}/readyz", timeout=10)
    except requests.RequestException as error:
        raise LoadTestError(f"no answer from {url}; is it up? make run starts it") from error
    if not answer.ok:
        raise LoadTestError(f"{url} is not ready ({answer.status_code}): {answer.text.strip()}")
    return str(answer.json()["model_version"])


def run(load: Load, objective: Objective, folder: Path) -> dict[str, Any]:
    """Run Locust and return its figures, `missed` (the verdict) and `version` among them.

    Writes report.html, stats_*.csv and summary.json into the folder.

    Raises:
        LoadTestError: the service does not answer, or Locust ended early.
    """
    version = check(load.url)
    folder.mkdir(parents=True, exist_ok=True)
    bodies, summary = folder / "encounters.json", folder / SUMMARY
    data.write(bodies, seed=load.seed)
    summary.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "locust", "--headless", "--only-summary", "--loglevel=WARNING"),
        *(f"--locustfile={LOCUSTFILE}", f"--host={load.url}", f"--html={folder / 'report.html'}"),
        *(f"--csv={folder / 'stats'}", f"--encounters={bodies}", f"--summary={summary}"),
        *(f"--shape={load.shape}", f"--most-users={load.users}", f"--seconds={load.seconds}"),
        *(f"--rate={load.rate}", *objective.options, *load.more, SCENARIOS[load.scenario]),
    ]
    # By the environment: a command line everyone can read.
    given = {
        # Without what would give Locust options of its own.
        **{name: text for name, text in os.environ.items() if not name.startswith(_LOCUSTS)},
        "PYTHONPATH": str(PROJECT_ROOT),
        "LOAD_API_KEY": load.key,
    }
    said = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    if not summary.exists():
        raise LoadTestError(f"Locust ended with code {said.returncode}:\n{said.stderr.strip()}")
    found: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    if not found["requests"]:
        raise LoadTestError(f"Locust asked nothing of {load.url}:\n{said.stderr.strip()}")
    return {**found, "version": version}


def history(folder: Path) -> list[dict[str, float]]:
    """Second by second: `second`, `users`, `rps`, `p50_ms`, `p95_ms`, `p99_ms`.

    Percentiles are Locust's, of the last ten seconds; seconds without an answer are left out.
    """
    with (folder / "stats_stats_history.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["Name"] == "Aggregated"]
    begin = float(rows[0]["Timestamp"]) if rows else 0.0
    return [
        {
            "second": float(row["Timestamp"]) - begin,
            "users": float(row["User Count"]),
            "rps": float(row["Requests/s"]),
            **{f"p{share}_ms": float(row[f"{share}%"]) for share in (50, 95, 99)},
        }
        for row in rows
        if row["95%"] not in ("", "N/A") and float(row["Requests/s"])
    ]

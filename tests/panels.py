"""Every question that the dashboards ask, and what has to run for an answer; for tests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from settings import PROJECT_ROOT
from tests.metrics import API, PIPELINE, used

FOLDER = PROJECT_ROOT / "monitoring" / "grafana" / "dashboards"


@dataclass(frozen=True, slots=True)
class Query:
    """One query of one panel.

    Attributes:
        board: name of the dashboard's file.
        panel: its title.
        expression: in PromQL, without Grafana's variables.
        jobs: of Prometheus, that give what it asks for; none if any target does.
    """

    board: str
    panel: str
    expression: str
    jobs: frozenset[str]


def boards(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """The committed dashboards by the name of their file."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def queries() -> Iterator[Query]:
    """All of them."""
    for name, board in boards().items():
        for panel in board["panels"]:
            for target in panel["targets"]:
                expression = target["expr"]
                yield Query(name, panel["title"], expression, jobs(expression))


def jobs(expression: str) -> frozenset[str]:
    """Jobs whose metrics an expression asks for."""
    named = re.findall(r'\bup\{job=~?"([^"]+)"', expression)
    found = {job for names in named for job in names.split("|")}
    if re.search(r"\b(job|route|model_version):\w+:\w+", expression):
        found.add("api")  # recording rules are all of its metrics
    for metric in used(expression):
        if metric in API:
            found.add("api")
        elif metric in PIPELINE:
            found.add("pipeline")
        elif metric.startswith("pg_"):
            found.add("postgres")
        elif metric.startswith("mlflow_"):
            found.add("mlflow")
        elif metric.startswith("airflow_"):
            found.add("airflow")
    return frozenset(found)

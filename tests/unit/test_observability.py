"""Which programs are found, what they are told, and what is said where there is none."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from services import airflow
from services.observability import (
    ALERTMANAGER,
    POSTGRES_EXPORTER,
    PROMETHEUS,
    STATSD_EXPORTER,
    Observability,
    ObservabilityError,
    configuration,
    find_tool,
)
from services.state import Secrets
from settings import PROJECT_ROOT, Settings

TOOLS = (PROMETHEUS, ALERTMANAGER, POSTGRES_EXPORTER, STATSD_EXPORTER)


def program(file: Path) -> Path:
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return file


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: str(tool.name))
def test_both_names_are_found_on_the_path(
    tool: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_tool(tool, "") is None  # type: ignore[arg-type]
    for name in reversed(tool.programs):  # type: ignore[attr-defined]
        file = program(tmp_path / name)
        assert find_tool(tool, "") == file  # type: ignore[arg-type]
    assert find_tool(tool, " OFF") is None  # type: ignore[arg-type]


def test_a_path_that_is_no_program_is_one_clear_error(tmp_path: Path) -> None:
    text = tmp_path / "prometheus"
    text.write_text("no program")
    for path in (text, tmp_path / "missing", tmp_path):
        with pytest.raises(ObservabilityError, match=f"DIABETES_PROMETHEUS is {path}, which is no"):
            find_tool(PROMETHEUS, str(path))
    text.chmod(0o755)
    assert find_tool(PROMETHEUS, str(text)) == text


def test_what_is_missing_is_said_in_a_line_each_and_nothing_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    made = Observability(Settings(state_dir=tmp_path, alertmanager="off"))
    with caplog.at_level(logging.INFO):
        assert made.start_statsd(None) is None
        made.start(5432, "password", {"api": "127.0.0.1:8000"})
    assert [record.message for record in caplog.records] == [
        STATSD_EXPORTER.advice,
        POSTGRES_EXPORTER.advice,
        "Alertmanager: switched off by DIABETES_ALERTMANAGER",
        "Prometheus: not found, no history of metrics and no alerts here; install Debian's "
        "package prometheus or set DIABETES_PROMETHEUS",
    ]
    assert made.urls == {}
    assert not (tmp_path / "prometheus").exists()


def test_configuration_names_each_job_once_and_its_target() -> None:
    made = configuration({"pipeline": "127.0.0.1:2", "api": "127.0.0.1:1"}, alertmanager="a:9093")
    jobs = {
        job["job_name"]: [target for group in job["static_configs"] for target in group["targets"]]
        for job in made["scrape_configs"]
    }
    assert jobs == {
        "alertmanager": ["a:9093"],
        "api": ["127.0.0.1:1"],
        "pipeline": ["127.0.0.1:2"],
    }
    assert made["global"]["scrape_interval"] == "5s"
    (rules,) = made["rule_files"]
    assert rules == str(PROJECT_ROOT / "monitoring" / "prometheus" / "rules" / "*.yaml")
    assert "alerting" not in configuration({})


def test_airflow_counts_only_where_somebody_listens(tmp_path: Path) -> None:
    secrets, chosen = Secrets(tmp_path), Settings(state_dir=tmp_path)
    arguments = (chosen, secrets, 5432, 8080, "http://mlflow:5000")
    without = airflow.environment(*arguments)
    assert not [name for name in without if "STATSD" in name]
    assert airflow.environment(*arguments, 9125) == without | {
        "AIRFLOW__METRICS__STATSD_ON": "True",
        "AIRFLOW__METRICS__STATSD_HOST": "127.0.0.1",
        "AIRFLOW__METRICS__STATSD_PORT": "9125",
        "AIRFLOW__METRICS__STATSD_PREFIX": "airflow",
        "AIRFLOW__METRICS__STATSD_INFLUXDB_ENABLED": "True",
    }

"""One loosened or tightened limit of every rule: its tests of promtool have to fail."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.manifests.test_rules import (
    FOLDER,
    alerts,
    change,
    needs_promtool,
    only,
    promtool,
)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for name in ("rules", "tests"):
        shutil.copytree(FOLDER / name, tmp_path / name)
    return tmp_path


# One loosened or tightened limit each; every test of promtool has to see it.
MUTATIONS = [
    ("ApiDown", "for: 30s", "for: 15s"),
    ("ApiDown", "max by (job) (up", "min by (job) (up"),
    ("ApiDown", "unless on (job) up", "and on (job) up"),
    ("MlflowDown", "for: 30s", "for: 1m"),
    ("PostgresDown", "min(pg_up) == 0", "min(pg_up) == 2"),
    ("PostgresDown", "or min(pipeline_database_up) == 0", ""),
    ("PostgresDown", 'max(up{job=~"postgres|pipeline"}) == 0', "vector(1) == 0"),
    ("PostgresDown", '"evidence", "silence"', '"evidence", "exporter"'),
    ("PostgresDown", 'max(up{job=~"postgres|pipeline"})', 'min(up{job=~"postgres|pipeline"})'),
    ("AirflowDown", "airflow_api_up) == 0", "airflow_api_up) == 2"),
    ("AirflowDown", "[5m]", "[30m]"),
    ("AirflowDown", 'max(up{job="airflow"}) == 1', 'max(up{job="airflow"}) == 2'),
    ("AirflowDown", 'max(up{job="airflow"}) == 1', 'max(up{job="airflow"}) >= 0'),
    ("AirflowDown", "and min(airflow_api_up offset 10m) == 1", ""),
    ("AirflowDown", "offset 10m", "offset 5m"),
    ("TargetMissing", "unless on (job)", "unless on (instance)"),
    ("TargetMissing", 'unless on (job) (up{job=~"postgres', 'unless on () (up{job=~"postgres'),
    ("TargetMissing", 'and on () max(up{job=~"postgres|pipeline"}) == 0', ""),
    ("TargetMissing", "for: 2m", "for: 5m"),
    ("AvailabilityBurnFast", "ratio_rate1h > 14.4", "ratio_rate1h > 15"),
    ("AvailabilityBurnFast", "and job:http_errors:ratio_rate5m > 14.4 * 0.005", ""),
    ("AvailabilityBurnFast", ">= 100", ">= 90"),
    ("AvailabilityBurnSlow", "ratio_rate6h > 6", "ratio_rate6h > 6.5"),
    ("AvailabilityBurnSlow", ">= 200", ">= 190"),
    ("LatencyBurnFast", "ratio_rate5m > 14.4", "ratio_rate5m > 16"),
    ("LatencyBurnFast", ">= 100", ">= 90"),
    ("LatencyBurnSlow", "ratio_rate30m > 6", "ratio_rate30m > 7"),
    ("LatencyBurnSlow", ">= 200", ">= 190"),
    ("NoChampion", "for: 15m", "for: 13m"),
    ("NoChampion", "(job, instance)", "(job)"),
    ("NoChampion", 'alias!="challenger"', 'alias!=""'),
    ("NoChampion", 'alias!="challenger"', 'alias="champion"'),
    ("ModelRefused", "[1h]) > 0", "[1h]) > 1.5"),
    ("ModelRefused", "[1h]) >= 3", "[1h]) >= 2"),
    ("ModelRefused", "[1h]) >= 3", "[1h]) >= 4"),
    ("ModelRefused", 'or model_loads_total{result="refused"} > 0', "or vector(1) < 0"),
    ("ModelRefused", "< 3600", "< 7200"),
    ("ModelStale", "> 90", "> 91"),
    ("ModelStale", 'alias!="challenger"', 'alias="champion"'),
    ("ModelStale", 'alias!="challenger"', 'alias!=""'),
    ("ModelStale", "max by", "min by"),
    ("DriftDetected", ">= 1000", ">= 999"),
    ("DriftDetected", "> on (window)", ">= on (window)"),
    (
        "DriftDetected",
        "> on (window) group_left () max by (window) (drift_limit)",
        "> on () group_left () min(drift_limit)",
    ),
    ("ScoreDrift", ">= 1000", "> 1000"),
    ("ScoreDrift", "on (window) group_left () max by (window)", "on () group_left () min"),
    ("CalibrationOff", "> 0.03", "> 0.04"),
    ("CalibrationOff", ">= 5000", ">= 2500"),
    ("DriftCheckStale", "max(", "min("),
    ("DataStale", "> 35", "> 34"),
    ("RejectsHigh", "> 0.005", "> 0.01"),
    ("DagFailing", "min by (dag_id)", "min"),
    ("DbtFailing", "error|fail", "error|warn"),
    ("PredictionLogSpoolGrowing", "[10m]) == 0", "[10m]) < 20"),
    ("PredictionLogSpoolGrowing", "and min_over_time(prediction_log_spool_bytes[10m]) > 0", ""),
    ("PredictionLogSpoolNearlyFull", "> 0.8", "> 0.9"),
    ("PredictionLogBroken", "> 0", "> 1"),
    ("PredictionLogBroken", "> 0", ">= 0"),
    ("PipelineUnreadable", "for: 10m", "for: 5m"),
    ("PipelineUnreadable", "min by (question)", "max"),
    ("DiskNearlyFull", "< 0.1", "<= 0.1"),
    ("job:http_requests:rate5m", "/v1/.+", ".+"),
    ("job:http_errors:rate1h", "or rate(http_requests_shed_total[1h])", ""),
    ("job:slow_predictions:rate5m", '"0.25"', '"0.5"'),
    ("route:http_request_duration_seconds:p95_rate5m", "0.95", "0.9"),
    ("model_version:prediction_probability:mean1h", "prediction_probability_sum", "up"),
]


def test_a_limit_of_every_alert_is_changed() -> None:
    assert {name for name, *_ in MUTATIONS} >= alerts().keys()


@needs_promtool
@pytest.mark.parametrize(("name", "old", "new"), MUTATIONS)
def test_a_changed_rule_fails_its_tests(copied: Path, name: str, old: str, new: str) -> None:
    change(copied, name, old, new)
    code, said = promtool("test", "rules", only(copied, name))
    assert code != 0
    assert "FAILED" in said
    assert "parse error" not in said


# --- Airflow's metrics ----------------------------------------------------------------------------

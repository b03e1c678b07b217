"""Metrics that rules and dashboards may use: those that something here, or an exporter, gives."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from settings import PROJECT_ROOT

PROMETHEUS = PROJECT_ROOT / "monitoring" / "prometheus"

API = frozenset(
    """
    http_requests_total http_request_duration_seconds_bucket http_request_duration_seconds_count
    http_requests_in_flight http_requests_shed_total
    prediction_probability_bucket prediction_probability_count prediction_probability_sum
    prediction_rows_total prediction_log_rows_total prediction_log_spooled_rows_total
    prediction_log_spool_bytes prediction_log_broken_files
    prediction_log_spool_files prediction_log_spool_limit_bytes prediction_log_connected
    prediction_log_disk_free_bytes prediction_log_disk_size_bytes
    prediction_log_copy_duration_seconds_sum prediction_log_copy_duration_seconds_count
    shadow_predictions_dropped_total
    model_info model_loads_total model_loaded_timestamp_seconds model_trained_timestamp_seconds
    """.split()  # noqa: SIM905 - a list to read
)
PIPELINE = frozenset(
    """
    pipeline_database_up pipeline_question_up pipeline_split_rows pipeline_batches
    pipeline_load_rows pipeline_load_deleted_rows pipeline_last_load_timestamp_seconds
    pipeline_published_timestamp_seconds pipeline_clipped_rows
    dbt_results dbt_build_duration_seconds dbt_build_finished_timestamp_seconds
    airflow_api_up dag_run_duration_seconds dag_run_success
    dag_run_last_success_timestamp_seconds dag_runs
    drift_psi drift_score_psi drift_missing_share drift_missing_share_reference
    drift_new_category_share drift_window_rows drift_limit drift_checked_timestamp_seconds
    drift_calibration_error drift_labelled_rows
    disk_free_bytes disk_size_bytes
    """.split()  # noqa: SIM905 - a list to read
)
OTHERS = frozenset(
    """
    up ALERTS process_resident_memory_bytes process_cpu_seconds_total process_start_time_seconds
    pg_up pg_database_size_bytes pg_settings_max_connections pg_stat_activity_count
    pg_stat_database_numbackends pg_stat_database_xact_commit pg_stat_database_xact_rollback
    pg_stat_database_blks_hit pg_stat_database_blks_read
    mlflow_http_request_duration_seconds_bucket mlflow_http_request_duration_seconds_count
    airflow_executor_running_tasks airflow_executor_queued_tasks airflow_executor_open_slots
    airflow_scheduler_heartbeat_total airflow_triggerer_heartbeat_total
    airflow_dag_processor_heartbeat_total airflow_dag_import_errors airflow_tasks_finished_total
    """.split()  # noqa: SIM905 - a list to read
)
METRICS = API | PIPELINE | OTHERS

_WORDS = frozenset(
    """
    sum min max count group topk abs round rate increase deriv time vector absent on ignoring by
    without and or unless bool clamp_min group_left group_right histogram_quantile label_replace
    min_over_time max_over_time sum_over_time avg_over_time offset
    """.split()  # noqa: SIM905 - a list to read
)


def used(expression: str) -> set[str]:
    """Metrics in an expression of PromQL, but for those that a recording rule makes."""
    named = re.findall(r'__name__=~"([^"]+)"', expression)
    bare = re.sub(r"\{[^}]*\}", " ", expression)
    bare = re.sub(r'"[^"]*"', " ", bare)
    bare = re.sub(r"\[[^\]]*\]", " ", bare)
    bare = re.sub(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"\boffset\s+\w+", " ", bare)
    found = set(re.findall(r"(?<![\w:.])[a-zA-Z_][\w:]*", bare)) - _WORDS
    found = {name for name in found if ":" not in name}
    return found | {name for names in named for name in names.split("|")}


def recorded(folder: Path = PROMETHEUS) -> set[str]:
    """Names that the recording rules of a folder make."""
    return {
        rule["record"]
        for file in (folder / "rules").glob("*.yaml")
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule
    }


def airflow_metrics() -> set[str]:
    """What statsd_exporter makes of Airflow's metrics, histograms' parts included."""
    mappings = yaml.safe_load((PROMETHEUS / "statsd-mappings.yaml").read_text())["mappings"]
    names = {mapping["name"] for mapping in mappings}
    return names | {f"{name}_{part}" for name in names for part in ("bucket", "count", "sum")}

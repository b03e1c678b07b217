"""What the four dashboards show: panels, their questions to Prometheus, and their limits.

A limit is where an alert of ../prometheus/rules/alerts.yaml fires, or a step before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["figure", "lines", "bars", "states", "heatmap"]

DAY = 86400.0
UP_OR_DOWN = {0: "down", 1: "up"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Attributes:
        title: above it.
        about: what it shows and when to worry.
        queries: (expression, legend) of each.
        unit: as Grafana names units.
        kind: `figure` goes into the row on top.
        limits: value from which it is yellow, and red; None where it never is.
        low: whether it is the small values that are bad.
        names: words for values.
        empty: what it says where there are no data.
        width: of a figure, in columns of 24.
    """

    title: str
    about: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    kind: Kind = "lines"
    limits: tuple[float | None, float | None] = (None, None)
    low: bool = False
    names: dict[int, str] = field(default_factory=dict)
    empty: str = "no data"
    width: int = 4


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard: its figures side by side on top, the rest two in a row."""

    uid: str
    title: str
    about: str
    since: str
    panels: Sequence[Panel]


def _answers(job: str) -> str:
    # A pod that died leaves the DNS, and its `up` with it: see ApiDown.
    return f'max(up{{job="{job}"}}) or 0 * max(max_over_time(up{{job="{job}"}}[1d]))'


SERVICE = Board(
    "diabetes-service",
    "Service: the prediction API",
    "Is the API up, quick and right, and does it keep what it predicts?",
    "now-1h",
    [
        Panel(
            "Replicas up",
            "Replicas that answer Prometheus; none: ApiDown.",
            [('sum(up{job="api"}) or 0 * max(max_over_time(up{job="api"}[1d]))', "")],
            kind="figure",
            limits=(None, 1),
            low=True,
            width=3,
        ),
        Panel(
            "Requests per second",
            "What callers ask, shed requests included; probes and scrapes are not counted.",
            [("sum(job:http_requests:rate5m)", "")],
            "reqps",
            "figure",
            width=3,
        ),
        Panel(
            "Errors",
            "Share of requests of five minutes that were answered 5xx or shed. Yellow: over the "
            "objective of 0.5 %; red: so for an hour, and AvailabilityBurnFast fires.",
            [("max(job:http_errors:ratio_rate5m)", "")],
            "percentunit",
            "figure",
            limits=(0.005, 14.4 * 0.005),
            empty="no requests",
        ),
        Panel(
            "Slow predictions",
            "Share of single predictions of five minutes that took longer than 250 ms. Yellow: "
            "over the objective of 1 %; red: so for an hour, and LatencyBurnFast fires.",
            [("max(job:slow_predictions:ratio_rate5m)", "")],
            "percentunit",
            "figure",
            limits=(0.01, 14.4 * 0.01),
            empty="no requests",
        ),
        Panel(
            "Error budget left",
            "Of 30 days, or of as many as Prometheus keeps; below zero the objective is missed.",
            [
                (
                    "1 - (sum(sum_over_time(job:http_errors:rate5m[30d])) "
                    "/ (sum(sum_over_time(job:http_requests:rate5m[30d])) > 0) or vector(0)) "
                    "/ 0.005",
                    "",
                )
            ],
            "percentunit",
            "figure",
            limits=(0.5, 0),
            low=True,
        ),
        Panel(
            "Spool",
            "Share of its limit that predictions waiting for the database take. Red: "
            "PredictionLogSpoolNearlyFull; at 100 % the API predicts no more.",
            [("max(prediction_log_spool_bytes / prediction_log_spool_limit_bytes)", "")],
            "percentunit",
            "figure",
            limits=(0.5, 0.8),
            width=3,
        ),
        Panel(
            "Files put aside",
            "Of answered predictions that PostgreSQL refused. Red: PredictionLogBroken.",
            [("sum(prediction_log_broken_files)", "")],
            kind="figure",
            limits=(None, 1),
            width=3,
        ),
        Panel(
            "Requests by route",
            "Requests per second.",
            [('sum by (route) (rate(http_requests_total{route=~"/v1/.+"}[1m]))', "{{route}}")],
            "reqps",
        ),
        Panel(
            "Answers by status",
            "4xx are callers' mistakes, 5xx ours. Shed requests have no route yet, and are 503.",
            [
                (
                    'sum by (status) (rate(http_requests_total{route=~"/v1/.+|none"}[1m]))',
                    "{{status}}",
                )
            ],
            "reqps",
        ),
        Panel(
            "Latency of single predictions",
            "Of five minutes. The objective is 99 % within 250 ms, so p99 stays below the line.",
            [
                (
                    f"route:http_request_duration_seconds:{share}_rate5m"
                    '{route="/v1/predict"} >= 0',
                    share,
                )
                for share in ("p50", "p95", "p99")
            ],
            "s",
            limits=(None, 0.25),
        ),
        Panel(
            "Latency of other routes",
            "Of five minutes. Batches and explanations take longer by nature.",
            [
                (
                    f"route:http_request_duration_seconds:{share}_rate5m"
                    '{route!="/v1/predict"} >= 0',
                    f"{{{{route}}}} {share}",
                )
                for share in ("p50", "p95", "p99")
            ],
            "s",
        ),
        Panel(
            "Requests in flight and shed",
            "Requests being served, and those per second that were one too many: 503 at once.",
            [
                ("sum(http_requests_in_flight)", "in flight"),
                ("sum(rate(http_requests_shed_total[1m]))", "shed per second"),
            ],
        ),
        Panel(
            "Encounters by source",
            "Per second, by how they came and what became of them.",
            [
                (
                    "sum by (source, result) (rate(prediction_rows_total[1m]))",
                    "{{source}} {{result}}",
                )
            ],
            "cps",
        ),
        Panel(
            "Prediction log",
            "Rows per second put into the spool and written to the database, the challenger's too: "
            "the lines lie together, or the spool grows.",
            [
                ("sum(rate(prediction_log_spooled_rows_total[1m]))", "spooled"),
                ("sum(rate(prediction_log_rows_total[1m]))", "written"),
            ],
            "cps",
        ),
        Panel(
            "Waiting predictions",
            "On disk, for the database. PredictionLogSpoolGrowing: some wait and none is written.",
            [("sum by (instance) (prediction_log_spool_bytes)", "{{instance}}")],
            "bytes",
        ),
    ],
)

_ENOUGH = "and on (window) drift_window_rows >= 1000"
_LIMIT = "on (window) group_left () max by (window) (drift_limit)"

MODEL = Board(
    "diabetes-model",
    "Model: the champion and drift",
    "Which version answers, and are its patients still those that it learnt from?",
    "now-7d",
    [
        Panel(
            "Version served",
            "By alias. Nothing here: NoChampion.",
            [("max by (alias, model_version) (model_info)", "{{alias}} {{model_version}}")],
            kind="figure",
            empty="none",
        ),
        Panel(
            "Age of the champion",
            "Since it was registered. Red: ModelStale, from 90 days on.",
            [('time() - max(model_trained_timestamp_seconds{alias!="challenger"})', "")],
            "s",
            "figure",
            limits=(60 * DAY, 90 * DAY),
            empty="unknown",
        ),
        Panel(
            "Features drifted",
            "Features whose PSI is over the limit, in windows of 1,000 rows or more. Red: "
            "DriftDetected.",
            [(f"sum((drift_psi > bool {_LIMIT}) {_ENOUGH})", "")],
            kind="figure",
            limits=(None, 1),
            empty="too few rows",
        ),
        Panel(
            "Drift of the score",
            "PSI of the score as a share of its limit, in windows of 1,000 rows or more. Red: "
            "ScoreDrift.",
            [(f"max((drift_score_psi / {_LIMIT}) {_ENOUGH})", "")],
            "percentunit",
            "figure",
            limits=(0.5, 1),
            empty="too few rows",
        ),
        Panel(
            "Calibration error",
            "How far predicted and observed risk lie apart on average, where 5,000 outcomes or "
            "more are known. Red: CalibrationOff, from 3 % on.",
            [("max(drift_calibration_error and on (window) drift_labelled_rows >= 5000)", "")],
            "percentunit",
            "figure",
            limits=(0.02, 0.03),
            empty="too few outcomes",
        ),
        Panel(
            "Last drift check",
            "Ago; one is due each night. Red: DriftCheckStale, from two days on.",
            [("time() - max(drift_checked_timestamp_seconds)", "")],
            "s",
            "figure",
            limits=(30 * 3600.0, 2 * DAY),
            empty="never",
        ),
        Panel(
            "PSI by feature",
            "The ten largest of the newest check. As a rule, from 0.1 on look at it, from 0.2 on "
            "(drift_limit) it is drift.",
            [("topk(10, max by (window, feature) (drift_psi))", "{{feature}} ({{window}})")],
            kind="bars",
            limits=(0.1, 0.2),
        ),
        Panel(
            "Largest PSI",
            "Each check moves the lines. As a rule the limit is 0.2.",
            [
                ("max by (window) (drift_psi)", "features, {{window}}"),
                ("max by (window) (drift_score_psi)", "score, {{window}}"),
                ("max by (window) (drift_limit)", "limit, {{window}}"),
            ],
        ),
        Panel(
            "Missing values",
            "The ten features whose share of missing values differs most from the training rows'.",
            [
                (
                    "topk(10, abs(max by (window, feature) (drift_missing_share) - on (feature) "
                    "group_left () max by (feature) (drift_missing_share_reference)))",
                    "{{feature}} ({{window}})",
                )
            ],
            "percentunit",
            "bars",
        ),
        Panel(
            "Never seen before",
            "The ten features with most rows whose category training never saw.",
            [
                (
                    "topk(10, max by (window, feature) (drift_new_category_share))",
                    "{{feature}} ({{window}})",
                )
            ],
            "percentunit",
            "bars",
        ),
        Panel(
            "Predicted risk",
            "Predictions per second by their probability: where the colour lies, and whether it "
            "moves.",
            [("sum by (le) (rate(prediction_probability_bucket[5m]))", "{{le}}")],
            "percentunit",
            "heatmap",
        ),
        Panel(
            "Mean risk by version",
            "Of an hour. A jump at a new version is that version's; one without is the patients'.",
            [("model_version:prediction_probability:mean1h", "version {{model_version}}")],
            "percentunit",
        ),
        Panel(
            "Versions tried",
            "swapped is good; refused: the self-test failed; failed: it could not be fetched. "
            "ModelRefused tells of both.",
            [("sum by (alias, result) (model_loads_total)", "{{alias}} {{result}}")],
        ),
        Panel(
            "Rows in the windows",
            "With fewer than 1,000 (the line) nothing is called drift.",
            [
                ("max by (window) (drift_window_rows)", "{{window}}"),
                ("max by (window) (drift_labelled_rows)", "{{window}}, outcome known"),
            ],
            limits=(None, 1000),
            low=True,
        ),
    ],
)

PIPELINE = Board(
    "diabetes-pipeline",
    "Pipeline: loads, dbt and DAGs",
    "Is clean_data fresh and complete, and do the DAGs end well?",
    "now-7d",
    [
        Panel(
            "Age of clean_data",
            "Since its tables were built. Red: DataStale, from 35 days on.",
            [("time() - max(pipeline_published_timestamp_seconds)", "")],
            "s",
            "figure",
            limits=(30 * DAY, 35 * DAY),
            empty="never built",
        ),
        Panel(
            "Age of the newest load",
            "Since it ended.",
            [("time() - max(pipeline_last_load_timestamp_seconds)", "")],
            "s",
            "figure",
            limits=(30 * DAY, 35 * DAY),
            empty="never loaded",
        ),
        Panel(
            "Encounters",
            "In all tables of clean_data.",
            [("sum(pipeline_split_rows)", "")],
            kind="figure",
        ),
        Panel(
            "Rejected",
            "Share of the newest load's rows. Red: RejectsHigh, from 0.5 % on; at 1 % it fails.",
            [('sum(pipeline_load_rows{result="rejected"}) / sum(pipeline_load_rows)', "")],
            "percentunit",
            "figure",
            limits=(0.001, 0.005),
        ),
        Panel(
            "dbt nodes failed",
            "When they last ran. Red: DbtFailing.",
            [
                (
                    'sum(dbt_results{status=~"error|fail|runtime error"}) or 0 * sum(dbt_results)',
                    "",
                )
            ],
            kind="figure",
            limits=(None, 1),
        ),
        Panel(
            "DAGs failed",
            "Whose newest ended run did not succeed. Red: DagFailing.",
            [("sum(min by (dag_id) (dag_run_success) == bool 0)", "")],
            kind="figure",
            limits=(None, 1),
            empty="no runs",
        ),
        Panel(
            "Rows by split",
            "A patient is in one split for good.",
            [("max by (split) (pipeline_split_rows)", "{{split}}")],
        ),
        Panel(
            "Newest load",
            "Rows by what became of them.",
            [("max by (result) (pipeline_load_rows)", "{{result}}")],
            kind="bars",
        ),
        Panel(
            "Clipped rows",
            "By feature and bound; docs/decisions/clipping.md says why.",
            [
                (
                    "topk(10, max by (feature, bound) (pipeline_clipped_rows))",
                    "{{feature}} {{bound}}",
                )
            ],
            kind="bars",
        ),
        Panel(
            "dbt results",
            "Nodes of the project by type, and what became of each when it last ran.",
            [("sum by (resource_type, status) (dbt_results)", "{{resource_type}} {{status}}")],
            kind="bars",
        ),
        Panel(
            "Duration of dbt's builds",
            "Of the newest whole one: of the data, and of the drift models.",
            [("max by (selection) (dbt_build_duration_seconds)", "{{selection}}")],
            "s",
        ),
        Panel(
            "Duration of DAGs",
            "Of the newest ended run.",
            [("max by (dag_id) (dag_run_duration_seconds)", "{{dag_id}}")],
            "s",
        ),
        Panel(
            "Newest run of each DAG",
            "How it ended. Red for a minute: DagFailing.",
            [("min by (dag_id) (dag_run_success)", "{{dag_id}}")],
            kind="states",
            limits=(None, 1),
            low=True,
            names={0: "failed", 1: "succeeded"},
        ),
        Panel(
            "Runs by state",
            "Of the newest 25 of each DAG.",
            [("sum by (dag_id, state) (dag_runs)", "{{dag_id}} {{state}}")],
        ),
    ],
)

_DISK = (
    "disk_free_bytes / disk_size_bytes or "
    "prediction_log_disk_free_bytes / prediction_log_disk_size_bytes"
)

INFRASTRUCTURE = Board(
    "diabetes-infrastructure",
    "Infrastructure: PostgreSQL, MLflow, Airflow",
    "Do the servers answer, and have they room?",
    "now-1h",
    [
        Panel(
            "Services",
            "As their alerts see them: PostgresDown, MlflowDown, AirflowDown, ApiDown.",
            [
                (
                    'min(pg_up or pipeline_database_up or max(up{job=~"postgres|pipeline"}))',
                    "PostgreSQL",
                ),
                (_answers("mlflow"), "MLflow"),
                (
                    "min(airflow_api_up or "
                    "(sum(increase(airflow_scheduler_heartbeat_total[5m])) > bool 0) or "
                    '0 * (max(up{job="airflow"}) == 1 and min(airflow_api_up offset 10m) == 1 '
                    "unless on () airflow_scheduler_heartbeat_total))",
                    "Airflow",
                ),
                (_answers("api"), "API"),
            ],
            kind="figure",
            limits=(None, 1),
            low=True,
            names=UP_OR_DOWN,
            width=12,
        ),
        Panel(
            "Targets down",
            "That do not answer Prometheus. Red for two minutes: TargetMissing.",
            [("sum(up == bool 0)", "")],
            kind="figure",
            limits=(None, 1),
        ),
        Panel(
            "Disk free",
            "The least of all volumes. Red: DiskNearlyFull, below 10 %.",
            [(f"min({_DISK})", "")],
            "percentunit",
            "figure",
            limits=(0.2, 0.1),
            low=True,
        ),
        Panel(
            "Alerts",
            "That fire, by severity.",
            [
                (
                    f'count(ALERTS{{alertstate="firing",severity="{severity}"}}) or vector(0)',
                    severity,
                )
                for severity in ("page", "ticket")
            ],
            kind="figure",
            limits=(None, 1),
        ),
        Panel(
            "Targets",
            "Whether each job answers Prometheus.",
            [("min by (job) (up)", "{{job}}")],
            kind="states",
            limits=(None, 1),
            low=True,
            names=UP_OR_DOWN,
        ),
        Panel(
            "Connections to PostgreSQL",
            "By database.",
            [('sum by (datname) (pg_stat_database_numbackends{datname!=""})', "{{datname}}")],
        ),
        Panel(
            "Transactions",
            "Committed per second, by database.",
            [
                (
                    'sum by (datname) (rate(pg_stat_database_xact_commit{datname!=""}[5m]))',
                    "{{datname}}",
                )
            ],
            "ops",
        ),
        Panel(
            "Blocks found in memory",
            "Share of the blocks that PostgreSQL asked for; far below 99 % it reads from disk.",
            [
                (
                    "sum(rate(pg_stat_database_blks_hit[5m])) "
                    "/ (sum(rate(pg_stat_database_blks_hit[5m])) "
                    "+ sum(rate(pg_stat_database_blks_read[5m])))",
                    "found",
                )
            ],
            "percentunit",
        ),
        Panel(
            "Databases",
            "Size on disk.",
            [
                (
                    'max by (datname) (pg_database_size_bytes{datname!~"template.*|postgres"})',
                    "{{datname}}",
                )
            ],
            "bytes",
        ),
        Panel(
            "Requests to MLflow",
            "Per second by status. 404 are aliases that are not set, and no fault.",
            [
                (
                    "sum by (status) (rate(mlflow_http_request_duration_seconds_count[5m]))",
                    "{{status}}",
                )
            ],
            "reqps",
        ),
        Panel(
            "Tasks of Airflow",
            "In its executor. Tasks that wait while slots are free: look at the scheduler.",
            [
                ("sum(airflow_executor_running_tasks)", "running"),
                ("sum(airflow_executor_queued_tasks)", "waiting"),
                ("sum(airflow_executor_open_slots)", "free slots"),
            ],
        ),
        Panel(
            "Heartbeats of Airflow",
            "Per minute. A line at zero is a component that hangs: the scheduler's, AirflowDown.",
            [
                (f"60 * sum(rate(airflow_{metric}_heartbeat_total[5m]))", name)
                for metric, name in (
                    ("scheduler", "scheduler"),
                    ("triggerer", "triggerer"),
                    ("dag_processor", "DAG processor"),
                )
            ],
            "cpm",
        ),
        Panel(
            "Memory",
            "Resident, of each process that tells it.",
            [("max by (job, instance) (process_resident_memory_bytes)", "{{job}} {{instance}}")],
            "bytes",
        ),
        Panel(
            "CPU",
            "Cores that each process keeps busy.",
            [
                (
                    "max by (job, instance) (rate(process_cpu_seconds_total[1m]))",
                    "{{job}} {{instance}}",
                )
            ],
        ),
    ],
)

BOARDS = {
    "service": SERVICE,
    "model": MODEL,
    "pipeline": PIPELINE,
    "infrastructure": INFRASTRUCTURE,
}
"""By the name of the file."""

"""Airflow DAG: predictions and the newest loads against the champion's reference -> monitoring."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import (
    DAG,
    Asset,
    AssetOrTimeSchedule,
    CronTriggerTimetable,
    Param,
    get_current_context,
    task,
)
from cosmos import (
    DbtTaskGroup,
    ExecutionConfig,
    ExecutionMode,
    InvocationMode,
    LoadMode,
    ProfileConfig,
    ProjectConfig,
    RenderConfig,
    TestBehavior,
)
from cosmos.profiles import PostgresUserPasswordProfileMapping

from settings import CLEAN_DATA, PROJECT_ROOT, settings

CONNECTION = "postgres_default"
DBT_PROJECT = PROJECT_ROOT / "dbt_diabetes"

# For a lost MLflow server or database; what a retry can't mend fails at once.
TRANSIENT: dict[str, Any] = {"retries": 2, "retry_delay": timedelta(seconds=30)}

with DAG(
    dag_id="diabetes_drift_monitoring",
    description="Have the patients changed? Predictions and loads against the champion's reference",
    doc_md=(PROJECT_ROOT / "docs" / "drift.md").read_text(encoding="utf-8"),
    # Each night for the predictions, and when a load has been published.
    schedule=AssetOrTimeSchedule(
        timetable=CronTriggerTimetable("30 3 * * *", timezone="UTC"),
        assets=[Asset(name=f"clean_data.{table}") for table in CLEAN_DATA],
    ),
    start_date=datetime(2025, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=1),
    default_args={"owner": "data-science", "execution_timeout": timedelta(minutes=20)},
    tags=["diabetes", "monitoring"],
    params={
        "hours": Param(
            24,
            type="integer",
            minimum=1,
            title="Hours of predictions",
            description="Length of the window of predictions, which ends when the run was due.",
        ),
        "outcome_days": Param(
            90,
            type="integer",
            minimum=1,
            title="Days of outcomes",
            description="Predictions so far back are held against outcomes that are known by now.",
        ),
        "retrain": Param(
            settings().drift_retrain,
            type="boolean",
            title="Retrain",
            description="Start diabetes_model_training where a feature or the score has drifted.",
        ),
    },
) as dag:

    @task(**TRANSIENT)
    def prepare() -> dict[str, int]:
        """Fetch the champion's reference and choose the rows of both windows."""
        from monitoring import tasks

        context = get_current_context()
        run = context["dag_run"]
        return tasks.prepare(CONNECTION, run.run_id, run.run_after, context["params"])

    compare = DbtTaskGroup(
        group_id="compare",
        project_config=ProjectConfig(
            dbt_project_path=DBT_PROJECT,
            manifest_path=settings().dbt_manifest,
            project_name="diabetes",
        ),
        profile_config=ProfileConfig(
            profile_name="diabetes",
            target_name="postgres",
            profile_mapping=PostgresUserPasswordProfileMapping(
                conn_id=CONNECTION, profile_args={"schema": "public", "threads": 4}
            ),
        ),
        render_config=RenderConfig(
            load_method=LoadMode.DBT_MANIFEST,
            select=["path:models/monitoring"],
            test_behavior=TestBehavior.AFTER_EACH,
            should_detach_multiple_parents_tests=False,
            emit_datasets=False,
        ),
        # As diabetes_data_processing, and for the same reasons: docs/decisions/cosmos.md.
        execution_config=ExecutionConfig(
            execution_mode=ExecutionMode.WATCHER, invocation_mode=InvocationMode.SUBPROCESS
        ),
        operator_args={
            "vars": {"drift_limit": settings().drift_limit},
            "env": {"DBT_EXCLUDE_RESOURCE_TYPES": "unit_test"},
            "append_env": True,
            "install_deps": False,
            "deferrable": False,
            "poke_interval": 2,
        },
    )

    @task(**TRANSIENT)
    def report() -> list[str]:
        """Draw the distributions of each window beside those of training, in MLflow."""
        from monitoring import tasks

        return tasks.report(CONNECTION, get_current_context()["dag_run"].run_id)

    @task.short_circuit(**TRANSIENT)
    def decide() -> bool:
        """Say what has drifted; go on only where it is to be trained anew for it."""
        from monitoring import tasks

        context = get_current_context()
        return tasks.decide(CONNECTION, context["dag_run"].run_id, context["params"]["retrain"])

    retrain = TriggerDagRunOperator(
        task_id="retrain",
        trigger_dag_id="diabetes_model_training",
        trigger_run_id="drift__{{ run_id }}",
        # A check that is run again asks for no second training.
        skip_when_already_exists=True,
    )

    decided = decide()
    prepare() >> compare >> [report(), decided]
    decided >> retrain
